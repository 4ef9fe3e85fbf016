"""`python -m sftx.training.plot_schedules > docs/schedules.svg`: every schedule as it is defined."""

from __future__ import annotations

from collections.abc import Iterator

from sftx.build import build
from sftx.config.options import component_of, options
from sftx.training.schedulers import Schedule

STEPS, WARMUP, EVAL_EVERY = 200, 0.1, 10
WIDTH, HEIGHT, GAP, COLUMNS = 200, 90, 34, 4


def rates(schedule: Schedule) -> list[float]:
    """Return the factor of `learning_rate` at each of `STEPS` steps; the eval loss stops falling half-way."""
    factors = []
    for step in range(STEPS):
        factors.append(schedule.at(step, STEPS))
        if (step + 1) % EVAL_EVERY == 0:
            schedule.observe(max(1.0, 2.0 - 2.0 * step / STEPS))
    return factors


def svg() -> str:
    """Return the picture: one panel a schedule, steps to the right, the factor upwards."""
    names = options("scheduler")
    rows = -(-len(names) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + 2 * GAP) + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    return head + "".join(panel for n, name in enumerate(names) for panel in _panel(n, name)) + "</svg>\n"


def _panel(number: int, name: str) -> Iterator[str]:
    node = component_of("scheduler", name)
    if "warmup_steps" in node:
        node = {**node, "warmup_steps": WARMUP}
    x = GAP + (number % COLUMNS) * (WIDTH + GAP)
    y = 2 * GAP + (number // COLUMNS) * (HEIGHT + 2 * GAP)
    yield f'<text x="{x}" y="{y - 10}" font-weight="bold">{name}</text>\n'
    yield f'<path d="M{x} {y}V{y + HEIGHT}H{x + WIDTH}" fill="none" stroke="#999"/>\n'
    yield f'<text x="{x - 4}" y="{y + 8}" text-anchor="end" fill="#666">1</text>\n'
    yield f'<text x="{x - 4}" y="{y + HEIGHT}" text-anchor="end" fill="#666">0</text>\n'
    points = " ".join(
        f"{x + WIDTH * step / (STEPS - 1):.1f},{y + HEIGHT * (1 - factor):.1f}"
        for step, factor in enumerate(rates(build(node)))
    )
    yield f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="2"/>\n'


if __name__ == "__main__":
    print(svg(), end="")
