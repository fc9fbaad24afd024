"""The base class of every section of the configuration, and the types of its values."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

MOST = 1 << 40  # of anything that is counted or measured here: more is a slip of the keyboard, or would overflow
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decibels = Annotated[float, Field(ge=-200, le=200)]  # more than float32 and any sound have
Preset = Literal["released", "paper", "learned", "eat", "ast"]  # asda/config/presets.py
Size = Literal["tiny", "small", "base", "large"]

Value = TypeVar("Value")
MAY_CHANGE = "may change on resume"
# A field of this type may have another value when a run resumes; any other field decides the weights and must not
# change (asda/run/resume.py). threads: MayChange[Count] = 2
MayChange = Annotated[Value, MAY_CHANGE]


class Section(BaseModel):
    """A part of the tree: immutable, without silent conversions, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections that a value of this type may be or hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]
