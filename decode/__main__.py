"""One rank of a decode pool: ``python -P -m decode --config FILE``."""

from decode.config import DecodeConfig
from decode.worker import serve
from engine.boot import main

if __name__ == "__main__":
    main("decode", DecodeConfig, serve)
