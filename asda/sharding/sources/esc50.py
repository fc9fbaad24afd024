"""The folder of ESC-50: meta/esc50.csv and audio/. --where esc10=True selects ESC-10.

Piczak, "ESC: Dataset for environmental sound classification", ACM Multimedia 2015.
"""

from pathlib import Path

from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Listing, Row, SourceOptions, only_input, refuse_duplicates, select

COLUMNS = ("filename", "fold", "target", "category")


def rows_from_esc50(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of an ESC-50 folder, their folds as fold1 to fold5, their classes in the order of `target`."""
    folder = only_input(inputs, "esc50")
    table = folder / "meta" / "esc50.csv"
    if not table.is_file() or not (folder / "audio").is_dir():
        raise UserError(f"--input {folder} has no meta/esc50.csv or no audio/, as the folder of ESC-50 has")
    rows: list[Row] = []
    category_of: dict[int, str] = {}
    num_others = 0
    for kept in select(table, options, COLUMNS):
        if kept is None:
            num_others += 1
            continue
        line, record = kept
        where = f"{table} line {line}"
        if not all(record[column] for column in COLUMNS) or not (record["fold"] + record["target"]).isdigit():
            raise UserError(f"{where}: {', '.join(COLUMNS)} must not be empty, and fold and target are numbers")
        if category_of.setdefault(int(record["target"]), record["category"]) != record["category"]:
            raise UserError(f"{where}: the target {record['target']} was {category_of[int(record['target'])]!r} before")
        name = f"audio/{record['filename']}"
        labels = (record["category"],) if options.use_labels else ()
        rows.append(Row(Place(f"{folder}/{name}"), record["filename"], labels, f"fold{record['fold']}", where))
    refuse_duplicates(rows)
    vocabulary = tuple(category_of[target] for target in sorted(category_of))
    if len(set(vocabulary)) < len(vocabulary):
        raise UserError(f"{table} gives one category two targets; each class has one")
    left_out = {"rows without the --where values": num_others}
    return Listing(rows, left_out, vocabulary if options.use_labels else None)
