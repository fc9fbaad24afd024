"""Where clips come from: one short module per source, all in the table SOURCES.

A source lists clips and what is known about them; it opens no audio. To add one, write a function
(input paths, options) -> Listing and name it in SOURCES: asda shards offers it as --source.
"""

from asda.sharding.sources.arguments import SOURCE_HELP, SOURCES, add_source_arguments, list_clips, options_from
from asda.sharding.sources.listing import Listing, Row, SourceOptions

__all__ = [
    "SOURCES",
    "SOURCE_HELP",
    "Listing",
    "Row",
    "SourceOptions",
    "add_source_arguments",
    "list_clips",
    "options_from",
]
