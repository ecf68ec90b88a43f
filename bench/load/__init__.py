"""The load harness: open loop, latency from the intended time, every failure a miss."""
