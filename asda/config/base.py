"""What every section of the configuration is made of: its base class and the types of its values."""

from typing import Annotated, Literal

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
Padding = Literal["constant", "masked"]  # of clips that are too short: seen as it is, or not seen


class Section(BaseModel):
    """A part of the tree: immutable, without silent conversions, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)
