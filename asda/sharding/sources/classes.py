"""AudioSet's classes by their machine ids (MIDs, as "/m/09x0r"): AudioSet's own table, or one in its form."""

from importlib.resources import files
from pathlib import Path

from asda.errors import UserError
from asda.sharding.sources.listing import read_cells

SHIPPED = Path(str(files("asda.data") / "audioset_labels.csv"))


class Classes:
    """Names of classes by MID, in the order of their indices."""

    def __init__(self, table: Path | None):
        """Read index, mid, name, with or without a header; None reads AudioSet's 527."""
        self.table = table or SHIPPED
        rows = [(line, [cell.strip() for cell in cells]) for line, cells in read_cells(self.table)]
        if rows and rows[0][1][0] == "index":
            rows = rows[1:]
        self._names: dict[str, str] = {}
        for number, (line, cells) in enumerate(rows):
            if len(cells) != 3 or cells[0] != str(number) or not all(cells):
                raise UserError(f"{self.table} line {line} is not index,mid,name with the index {number}")
            self._names[cells[1]] = cells[2]
        if not rows or len(self._names) < len(rows) or len(set(self._names.values())) < len(rows):
            raise UserError(f"{self.table} is empty, or names a class twice; each line is one class: index,mid,name")
        self._labels: dict[str, tuple[str, ...]] = {}  # most lists come again: two million rows share them

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all classes; a class's id is its position."""
        return tuple(self._names.values())

    def labels(self, mids: str, where: str) -> tuple[str, ...]:
        """Return the names of MIDs separated by commas. Raises UserError with `where` for an unknown one."""
        labels = self._labels.get(mids)
        if labels is None:
            wanted = [mid.strip() for mid in mids.split(",") if mid.strip()]
            if unknown := next((mid for mid in wanted if mid not in self._names), None):
                raise UserError(
                    f"{where}: {unknown!r} is not among the {len(self._names)} classes of {self.table}; "
                    "correct it, or give the table that has it as --class-labels"
                )
            labels = self._labels[mids] = tuple(dict.fromkeys(self._names[mid] for mid in wanted))
        return labels
