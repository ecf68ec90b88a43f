"""Where a request went, in the words of ``x-baton-path``. Pure."""

from coordinator.records.records import Record


def describe_path(record: Record) -> str:
    """Which pools and what that took; what is known so far."""
    parts = [f"decode={record.decode_pool}"] if record.decode_pool else []
    if record.prefill_pool:
        parts.append(f"prefill={record.prefill_pool}")
        if record.path is not None:
            parts.append(f"ring={record.path.ring_size}")
    elif record.num_target_cached_tokens is not None:
        parts.append("local")
    if record.num_computed_tokens is not None:
        parts.append(f"cached={record.num_cached_tokens}")
        parts.append(f"computed={record.num_computed_tokens}")
    if record.num_loaded_tokens:
        parts.append(f"loaded={record.num_loaded_tokens}")
    if record.path is not None:
        if record.path.num_fetched_tokens:
            parts.append(f"fetched={record.path.num_fetched_tokens}")
        parts.append(f"moved={record.path.num_moved_tokens}")
    if record.lost:
        parts.append(f"attempts={record.attempt}")
        parts.append(f"lost={'+'.join(ended.reason for ended in record.lost)}")
    return "; ".join(parts)
