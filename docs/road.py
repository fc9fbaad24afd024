"""Draw docs/road.svg, the picture in the README: python docs/road.py > docs/road.svg."""

BOXES = [  # (column, row, title, what it does, command or file)
    (0, 0, "Audio files", "WAV, FLAC, OGG, MP3, ...", "your folder, AudioSet, ESC-50"),
    (1, 0, "Shards", "tar + zstd, a hash for each clip", "asda shards"),
    (2, 0, "Data stream", "verified, shuffled, resumable", "asda/data/stream.py"),
    (3, 0, "Log-mel patches", "Kaldi features, by NVIDIA DALI", "asda/data/features/"),
    (3, 1, "Pre-training", "masked students, no labels", "asda/models/pretrain.py"),
    (2, 1, "Fine-tuning", "a classifier on the encoder", "asda/train.py"),
    (1, 1, "Evaluation", "accuracy, mAP on held-out clips", "asda evaluate"),
    (0, 1, "Tags and features", "for your own recordings", "asda predict, asda features"),
]
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 230, 84, 34, 70, 12  # pixels
BLUE, ORANGE, INK, GREY = "#2a6f97", "#b85c0e", "#1d2733", "#444"


def corner(column: int, row: int) -> tuple[int, int]:
    """Return the upper left corner of a box, in pixels."""
    return MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y)


def box(column: int, row: int, title: str, action: str, place: str) -> str:
    """Draw a box with three lines of text."""
    x, y = corner(column, row)
    colour = BLUE if row == 0 else ORANGE
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff" stroke="{colour}"/>'
        f'<text x="{x + 12}" y="{y + 26}" font-size="16" font-weight="600" fill="{INK}">{title}</text>'
        f'<text x="{x + 12}" y="{y + 47}" font-size="12" fill="{GREY}">{action}</text>'
        f'<text x="{x + 12}" y="{y + 68}" font-size="11" font-family="monospace" fill="{colour}">{place}</text>'
    )


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Draw an arrow, horizontal or vertical; its head is a triangle of 8 pixels."""
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        back = x1 - 8 if x1 > x0 else x1 + 8
        base, sides = (back, y1), f"{back},{y1 - 4} {back},{y1 + 4}"
    else:
        base, sides = (x1, y1 - 8), f"{x1 - 4},{y1 - 8} {x1 + 4},{y1 - 8}"
    return (
        f'<line x1="{x0}" y1="{y0}" x2="{base[0]}" y2="{base[1]}" stroke="{INK}" stroke-width="1.6"/>'
        f'<polygon points="{x1},{y1} {sides}" fill="{INK}"/>'
    )


def teacher() -> str:
    """Draw the teacher, beside the arrow from the patches to pre-training."""
    x, y = corner(3, 0)
    return (
        f'<rect x="{x + 84}" y="{y + HEIGHT + 14}" width="140" height="42" rx="6" fill="#eef4f8" stroke="{BLUE}"/>'
        f'<text x="{x + 94}" y="{y + HEIGHT + 32}" font-size="12" fill="{INK}">EMA teacher</text>'
        f'<text x="{x + 94}" y="{y + HEIGHT + 48}" font-size="11" fill="{GREY}">unmasked; sets targets</text>'
    )


def picture() -> str:
    """Return the whole picture as SVG."""
    width, height = corner(4, 2)[0] - GAP_X + MARGIN, corner(0, 2)[1] - GAP_Y + MARGIN
    middle = HEIGHT // 2
    arrows = []
    for column in range(3):
        x, y = corner(column, 0)
        arrows.append(arrow((x + WIDTH + 3, y + middle), (x + WIDTH + GAP_X - 5, y + middle)))
        x, y = corner(column + 1, 1)
        arrows.append(arrow((x - 3, y + middle), (x - GAP_X + 5, y + middle)))
    x, y = corner(3, 0)
    arrows.append(arrow((x + 48, y + HEIGHT + 3), (x + 48, y + HEIGHT + GAP_Y - 5)))
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    body = "\n".join([background, *(box(*one) for one in BOXES), *arrows, teacher()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif">\n{body}\n</svg>'
    )


if __name__ == "__main__":
    print(picture())
