"""The commands behind `asda`: a module for each command, which parses arguments, calls the package, and prints.

A module has `parse_args(argv)`, which needs no torch, and `main(argv)`. Training can be changed without opening any.
"""

COMMANDS = {  # name -> (module with main(argv), what it does)
    "shards": ("asda.commands.shards", "turn audio files into a dataset of verified shards"),
    "inspect": ("asda.commands.inspect", "show what is in a dataset of shards, and whether it is intact"),
    "train": ("asda.train", "pre-train or fine-tune, as a JSON configuration says"),
    "evaluate": ("asda.evaluate", "score fine-tuned checkpoints on held-out shards"),
    "predict": ("asda.commands.predict", "tag audio files: a table, JSON, or a picture"),
    "features": ("asda.commands.features", "write the features of audio files or shards"),
    "convert": ("asda.commands.convert", "read official checkpoints of EAT, ASDA, SSLAM and AST, or write them"),
    "describe": ("asda.commands.describe", "print parameters, tokens and FLOPs of a configuration or a checkpoint"),
    "probe": ("asda.commands.probe", "evaluate frozen features with k-NN and a linear probe"),
    "crossval": ("asda.commands.crossval", "train and evaluate a configuration over folds and seeds"),
    "attention": ("asda.commands.attention", "measure how much attention falls on irrelevant context"),
    "report": ("asda.commands.report", "write an HTML page about one run or several"),
}
MAKING_FILES = ("shards", "train", "features", "convert", "probe", "crossval", "attention", "report")  # as their result
