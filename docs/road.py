"""Draws docs/road.svg, the picture of the README: python docs/road.py > docs/road.svg."""

BOXES = [  # (column, row, title, what it does, where it is)
    (0, 0, "audio files", "WAV, FLAC, OGG, MP3 ...", "AudioSet, ESC-50, yours"),
    (1, 0, "tar shards", "one checked zstd frame a clip", "asda shards"),
    (2, 0, "verified stream", "exact order, every byte checked", "asda/data/stream.py"),
    (3, 0, "log-mel patches", "Kaldi-exact, in one DALI pipeline", "asda/data/features/dali.py"),
    (3, 1, "16 masked students", "each sees a fifth of the clip", "asda/models/pretrain.py"),
    (2, 1, "DeepSpeed ZeRO", "one loop, atomic checkpoints", "asda/train.py"),
    (1, 1, "fine-tuning", "labels, from the same encoder", "asda/train.py"),
    (0, 1, "evaluation", "every held-out clip once", "asda/evaluate.py"),
]
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 230, 84, 34, 70, 12
BLUE, ORANGE, INK = "#2a6f97", "#e07a1f", "#1d2733"


def corner(column: int, row: int) -> tuple[int, int]:
    """Upper left corner of a box, in pixels."""
    return MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y)


def box(column: int, row: int, title: str, action: str, place: str) -> str:
    """A box with three lines."""
    x, y = corner(column, row)
    colour = BLUE if row == 0 else ORANGE
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff" stroke="{colour}"/>'
        f'<text x="{x + 12}" y="{y + 26}" font-size="16" font-weight="600" fill="{INK}">{title}</text>'
        f'<text x="{x + 12}" y="{y + 47}" font-size="12" fill="#444">{action}</text>'
        f'<text x="{x + 12}" y="{y + 68}" font-size="11" font-family="monospace" fill="{colour}">{place}</text>'
    )


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """A straight arrow."""
    return (
        f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{INK}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def picture() -> str:
    """The whole picture."""
    width, height = corner(4, 2)[0] - GAP_X + MARGIN, corner(0, 2)[1] - GAP_Y + MARGIN
    middle = HEIGHT // 2
    arrows = []
    for column in range(3):
        x, y = corner(column, 0)
        arrows.append(arrow((x + WIDTH + 3, y + middle), (x + WIDTH + GAP_X - 5, y + middle)))
        x, y = corner(column + 1, 1)
        arrows.append(arrow((x - 3, y + middle), (x - GAP_X + 5, y + middle)))
    x, y = corner(3, 0)
    arrows.append(arrow((x + 60, y + HEIGHT + 3), (x + 60, y + HEIGHT + GAP_Y - 5)))
    teacher = (
        f'<rect x="{x + 96}" y="{y + HEIGHT + 14}" width="128" height="42" rx="6" fill="#eef4f8" stroke="{BLUE}"/>'
        f'<text x="{x + 106}" y="{y + HEIGHT + 32}" font-size="12" fill="{INK}">EMA teacher, fp32</text>'
        f'<text x="{x + 106}" y="{y + HEIGHT + 48}" font-size="11" fill="#444">sees all, sets targets</text>'
    )
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs><rect width="100%" height="100%" fill="#fff"/>'
    )
    body = "\n".join([head, *(box(*one) for one in BOXES), *arrows, teacher])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="system-ui, sans-serif">\n{body}\n</svg>'
    )


if __name__ == "__main__":
    print(picture())
