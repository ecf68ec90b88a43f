"""A store: ``python -P -m kvtransfer.store --config FILE``."""

from kvtransfer.boot import main
from kvtransfer.store.config import StoreConfig
from kvtransfer.store.worker import serve

if __name__ == "__main__":
    main("store", StoreConfig, serve)
