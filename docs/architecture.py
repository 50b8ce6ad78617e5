"""Draws docs/architecture.svg: K-Adapter beside a backbone of 24 layers. After a change: `python docs/architecture.py`."""

from pathlib import Path


WIDTH, HEIGHT = 810, 446
INK, QUIET = "#333", "#777"
COLUMN, BOX, BOX_HEIGHT = 190, 150, 44
# From the bottom up: the backbone's parts, and the y coordinate at which the state above each is read.
BACKBONE = ["embeddings", "layers 1 to 11", "layers 12 to 22", "layers 23, 24"]
BOTTOM, STEP = 356, 76
ADAPTERS = {"factual": "#fdf1dd", "linguistic": "#e6f4e8"}


def box(x: float, y: float, text: str, width: float = BOX, height: float = BOX_HEIGHT, fill: str = "#fff") -> str:
    """A box with its text; `x` is its centre, `y` its upper edge."""
    label = f'<text x="{x}" y="{y + height / 2 + 5}">{text}</text>'
    return f'<rect x="{x - width / 2}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#555"/>{label}'


def line(*points: tuple[float, float], arrow: bool = True) -> str:
    path = " L".join(f"{x} {y}" for x, y in points)
    head = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path d="M{path}" fill="none" stroke="#555" stroke-width="1.3"{head}/>'


def panel(x: float, title: str, fill: str) -> str:
    left, width = x - COLUMN / 2, COLUMN
    return (
        f'<rect x="{left}" y="86" width="{width}" height="{BOTTOM + 60 - 86}" rx="10" fill="{fill}"/>'
        f'<text x="{x}" y="{BOTTOM + 80}" font-weight="bold">{title}</text>'
    )


def drawing() -> str:
    backbone, *columns = (130, 430, 680)
    tops = [BOTTOM - STEP * number for number in range(len(BACKBONE))]
    parts = [panel(backbone, "backbone, frozen", "#e9eef6")]
    for x, (name, fill) in zip(columns, ADAPTERS.items(), strict=True):
        parts.append(panel(x, f"adapter “{name}”", fill))
        parts.append(f'<text x="{x}" y="{BOTTOM + 26}" fill="{QUIET}">reads, never writes</text>')
    # The fusion and the head.
    parts.append(box(405, 46, "fusion", 740, 30, "#f3e8f5"))
    parts.append(box(405, 2, "task head", 740, 26))
    parts.append(line((405, 46), (405, 30)))
    # The backbone from the bottom up, and its last state.
    parts += [box(backbone, top, text) for top, text in zip(tops, BACKBONE, strict=True)]
    parts += [
        line((backbone, low), (backbone, high + BOX_HEIGHT + 2)) for low, high in zip(tops, tops[1:], strict=False)
    ]
    parts.append(line((backbone, tops[-1]), (backbone, 78)))
    # Each state that is read goes to the adapter layer of the same height.
    for number, (top, state) in enumerate(zip(tops, (0, 11, 22), strict=False)):
        bus = top - 16
        last = columns[-1] - 50
        parts.append(line((backbone, bus), (last, bus), arrow=False))
        parts.append(f'<text x="{backbone + 150}" y="{bus - 6}" fill="{QUIET}">state {state}</text>')
        parts.append(f'<circle cx="{backbone}" cy="{bus}" r="3" fill="{INK}"/>')
        for x in columns:
            layer = tops[number + 1]
            parts.append(f'<circle cx="{x - 50}" cy="{bus}" r="3" fill="{INK}"/>')
            parts.append(line((x - 50, bus), (x - 50, layer + BOX_HEIGHT + 2)))
            parts.append(box(x, layer, f"adapter layer {number}"))
            above = tops[number + 2] + BOX_HEIGHT + 2 if number < 2 else 78
            parts.append(line((x, layer), (x, above)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="14" fill="{INK}" text-anchor="middle">\n'
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "architecture.svg").write_text(drawing(), encoding="utf-8")
