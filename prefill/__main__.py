"""One rank of a prefill pool: ``python -P -m prefill --config FILE``."""

from engine.boot import main
from prefill.config import PrefillConfig
from prefill.worker import serve

if __name__ == "__main__":
    main("prefill", PrefillConfig, serve)
