"""Unit vectors that are far apart: how the embedded model tells words from one another.

``spread`` is trained: points on a sphere repel each other, more and more only the nearest ones,
until the largest cosine of any two is small (a spherical code).
"""

import torch

FIRST_SHARPNESS, LAST_SHARPNESS = 10.0, 60.0
NUM_STEPS = 300


def spread(count: int, size: int, seed: int) -> torch.Tensor:
    """``[count, size]`` unit vectors, the same ones for the same seed.

    Args:
        count: how many.
        size: of each.
        seed: of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    points = _unit(torch.randn(count, size, generator=generator))
    for step in range(NUM_STEPS):
        progress = step / NUM_STEPS
        sharpness = FIRST_SHARPNESS * (LAST_SHARPNESS / FIRST_SHARPNESS) ** progress
        cosines = points @ points.T
        cosines.fill_diagonal_(-2.0)
        push = torch.softmax(sharpness * cosines, dim=1) @ points
        points = _unit(points - 0.5 * (1.0 - progress) * push)
    return points


def _unit(points: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(points, dim=1)
