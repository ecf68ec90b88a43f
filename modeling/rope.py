"""Rotary position embedding: frequencies of every supported scaling, and one multiplication.

A checkpoint pairs channel ``i`` of a head with channel ``i + H/2``. The rows of W_q and W_k (and
the q and k norms) are reordered at load so that a pair lies side by side; the rotation is then one
complex multiplication in fp32. Scores are unchanged, because q and k are reordered alike; cached
keys lie in the reordered channel order, on every rank and in every pool.
"""

import math

import torch

from modeling.checkpoint.rope_config import RopeConfig


class Rope:
    """The rotation of one model."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        inv_freq, self._scale = frequencies(config, head_dim)
        self._inv_freq = inv_freq.to(device)

    def at(self, positions_T: torch.Tensor) -> torch.Tensor:
        """The rotation at each position, complex64 [T, 1, H/2], for :func:`rotate`."""
        angles = positions_T[:, None].float() * self._inv_freq
        return torch.complex(angles.cos() * self._scale, angles.sin() * self._scale)[:, None]


def rotate(x_TNH: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate heads in reordered channel order; computed in fp32, returned in x's dtype."""
    pairs = x_TNH.float().view(*x_TNH.shape[:-1], -1, 2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    return rotated.flatten(-2).to(x_TNH.dtype)


def channel_order(head_dim: int) -> torch.Tensor:
    """The checkpoint's channel at each place of a reordered head: 0, H/2, 1, H/2 + 1, ..."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


def frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per position, fp32 [H/2], and the factor on cosine and sine.

    The arithmetic follows transformers' modeling_rope_utils operation by operation, so that fp32
    results agree.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if config.type == "dynamic":
        # NTK-aware base (bloc97, emozilla): 1 at the original length.
        stretch = config.factor * config.target_len / config.original_max_len - (config.factor - 1)
        base = (
            config.theta * stretch ** (head_dim / (head_dim - 2)) if head_dim > 2 else config.theta
        )
        return 1.0 / base**exponents, 1.0
    if config.type == "yarn":
        return _yarn(config, head_dim)
    inv_freq = 1.0 / config.theta**exponents
    if config.type == "linear":
        inv_freq = inv_freq / config.factor
    elif config.type == "llama3":
        inv_freq = _llama3(config, inv_freq)
    return inv_freq, 1.0


def _llama3(config: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, the middle blended."""
    wavelength = 2 * math.pi / inv_freq
    low, high = config.low_freq_factor, config.high_freq_factor
    scaled = torch.where(
        wavelength > config.original_max_len / low, inv_freq / config.factor, inv_freq
    )
    smooth = (config.original_max_len / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / config.factor + smooth * scaled
    middle = (wavelength >= config.original_max_len / high) & (
        wavelength <= config.original_max_len / low
    )
    return torch.where(middle, blended, scaled)


def _yarn(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071), NTK by parts."""

    def dimension_of(num_rotations: float) -> float:
        ratio = config.original_max_len / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (config.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return inv_freq, _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)
