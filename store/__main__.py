"""A store: ``python -P -m store --config FILE``."""

from engine.boot import main
from store.config import StoreConfig
from store.worker import serve

if __name__ == "__main__":
    main("store", StoreConfig, serve)
