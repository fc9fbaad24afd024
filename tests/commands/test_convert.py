"""Official checkpoints in and out: nothing is lost, nothing is guessed in silence, nothing broken comes through."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from conversion import convert
from safetensors.torch import save_file
from tiny_tools import room_for
from torch import Tensor

from asda.checkpoint.read import read_description
from asda.checkpoint.weights import read_weights
from asda.config.data import LogMelStats
from asda.config.model import ClassifyConfig, ModelConfig, PretrainConfig
from asda.config.run import Config, load_config
from asda.data.labels import audioset_labels
from asda.errors import UserError
from asda.models.classifier import Classifier
from asda.models.encoder import Encoder
from asda.models.pretrain import MaskedStudents
from asda.objectives import make_objective
from asda.official.fairseq import official_positions
from asda.official.fairseq_settings import input_notes

ROOT = Path(__file__).parents[2]
KINDS = ["asda_pretrain", "eat_pretrain", "asda_finetune", "eat_finetune"]
FINETUNED = KINDS[2:]
IMAGE = "modality_encoders.IMAGE."
POSITIONS = IMAGE + "fixed_positional_encoder.positions"

MEL_PATCHES = 8  # of a row of the table of positions
State = dict[str, Any]
Change = Callable[[State], object]


def converted(*arguments: object) -> str:
    """What a conversion prints; it must succeed."""
    done = convert(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def official(shared: Path, kind: str) -> State:
    return torch.load(shared / "golden" / f"{kind}_official.pt", weights_only=True)


def changed(shared: Path, kind: str, change: Change, path: Path) -> Path:
    state = official(shared, kind)
    change(state)
    torch.save(state, path)
    return path


def tensors_of(state: State) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, the teacher's behind "_ema."."""
    flat = {f"_ema.{key}": tensor for key, tensor in state["model"].get("_ema", {}).items()}
    return flat | {key: value for key, value in state["model"].items() if key != "_ema"}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare bit for bit, except the positions.

    numpy computes them in fp32, and the processor decides the last bits. Its power has an error of a unit in the last
    place, so a frequency is off by 2^-23 of itself, and the phase in row r by r 2^-23 at most. Its sine adds 2 units in
    the last place; at 1 a unit is 2^-24 to 2^-23.
    """
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == torch.float32
        assert ours[key].shape == tensor.shape
        if key.endswith("positions"):
            error_N = (ours[key] - tensor).abs().amax(-1).flatten()
            row_N = torch.arange(len(error_N)) // MEL_PATCHES
            assert (error_N <= (row_N + 2) * 2**-23).all(), key
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.fixture(scope="module")
def weights(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden checkpoint, converted into a folder of its name."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        converted(shared / "golden" / f"{kind}_official.pt", "--out", folder / kind)
    return folder


# ---- there and back


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_every_tensor_is_the_same(kind: str, weights: Path, shared: Path, tmp_path: Path):
    converted(weights / kind, "--to", "official", "--out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same(tensors_of(back), tensors_of(official(shared, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_back_and_there_again_the_folder_is_the_same(kind: str, weights: Path, tmp_path: Path):
    converted(weights / kind, "--to", "official", "--out", tmp_path / "back.pt")
    converted(tmp_path / "back.pt", "--out", tmp_path / "again")
    for file in (weights / kind).iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        ({"log_mel": LogMelStats(mean=-4.268, std=4.569)}, []),
        (
            {"log_mel": LogMelStats(mean=-2.5, std=3.5)},
            ["normalise by AudioSet's mean -4.268 and std 4.569, this model wants -2.5 and 3.5"],
        ),
        (
            {"log_mel": LogMelStats(mean=-4.268, std=4.569), "padding": "masked"},
            ["pads with a log-mel of 0, which its network sees; this model hides padding from the network"],
        ),
    ],
)
def test_what_the_official_code_will_do_otherwise_is_noted(values: dict, notes: list[str], weights: Path):
    described = read_description(weights / "asda_finetune")
    found = input_notes(described.model_copy(update={"data": described.data.model_copy(update=values)}))
    assert len(found) == len(notes)
    assert all(words in sentence for words, sentence in zip(notes, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cfg_that_we_write_says_all_that_we_read_from_one(kind: str, weights: Path, tmp_path: Path):
    converted(weights / kind, "--to", "official", "--out", tmp_path / "back.pt")
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    del state["asda"]  # as in a file that fairseq has written again
    torch.save(state, tmp_path / "back.pt")
    converted(tmp_path / "back.pt", "--out", tmp_path / "again")
    described, again = (read_description(folder) for folder in (weights / kind, tmp_path / "again"))
    assert again.model_copy(update={"about": described.about}) == described


@pytest.mark.parametrize("kind", KINDS)
def test_the_cfg_that_we_write_agrees_with_the_official_one(kind: str, weights: Path, shared: Path, tmp_path: Path):
    converted(weights / kind, "--to", "official", "--out", tmp_path / "back.pt")
    ours = torch.load(tmp_path / "back.pt", weights_only=True)["cfg"]["model"]
    cfg = official(shared, kind)["cfg"]
    theirs = cfg["model"]
    if kind in FINETUNED:  # fairseq keeps the inner one in the model section, the golden file beside it
        inner, expected = ours.pop("pretrained_model_args")["model"], cfg["pretrained_model_args"]["model"]
        # A fine-tuned model has forgotten its objective: what we fill in is the published one.
        expected = {key: expected[key] for key in ("depth", "num_heads", "embed_dim", "mlp_ratio", "norm_eps")}
        assert expected.items() <= inner.items()
        del ours["model_path"], ours["data"]
    else:
        del ours["max_update"]  # a run's, not the model's
    assert leaves(ours).items() <= leaves(theirs).items()


def leaves(tree: State, prefix: str = "") -> State:
    found: State = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_a_base_sized_eat_with_its_large_tables_there_and_back(tmp_path: Path):
    torch.manual_seed(0)
    state = random_official_eat(depth=12, width=768)
    torch.save({"model": state}, tmp_path / "eat.pt")
    printed = converted(tmp_path / "eat.pt", "--out", tmp_path / "eat")
    assert "encoder 85,254,144, decoder 2,585,856" in printed  # 87,840,000 together
    assert "heads of 64 features are assumed" in printed
    description = read_description(tmp_path / "eat")
    assert (description.preset, description.size, description.model) == ("eat", "base", BASE_EAT)
    assert description.objective == load_config(ROOT / "configs" / "as2m.json", ["preset=eat"]).objective.model_copy(
        update={"utterance_weight": 192.0}
    )
    converted(tmp_path / "eat", "--to", "official", "--out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)
    assert_same(tensors_of(back), state)


BASE_EAT = ModelConfig(
    mlp_ratio=4.0, attention_lambda="absent", attention_norm="none", attention_scale=1.0, width=768, depth=12, heads=12
)


def random_official_eat(depth: int, width: int) -> dict[str, Tensor]:
    """Names and shapes as in the EAT repository (models/EAT_pretraining.py, images.py, modules.py)."""
    shapes: dict[str, tuple[int, ...]] = {
        IMAGE + "extra_tokens": (1, 1, width),
        IMAGE + "local_encoder.proj.weight": (width, 1, 16, 16),
        IMAGE + "local_encoder.proj.bias": (width,),
        IMAGE + "context_encoder.norm.weight": (width,),
        IMAGE + "context_encoder.norm.bias": (width,),
        IMAGE + "decoder.proj.weight": (width, width),
        IMAGE + "decoder.proj.bias": (width,),
    }
    for layer in range(6):
        shapes[f"{IMAGE}decoder.blocks.{layer}.0.weight"] = (width, width // 16, 3, 3)
        shapes[f"{IMAGE}decoder.blocks.{layer}.0.bias"] = (width,)
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in range(depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    return state | {POSITIONS: official_positions(768, 8, width)}


# ---- the same function


@pytest.mark.parametrize("kind", FINETUNED)
def test_a_converted_classifier_gives_the_official_logits(kind: str, weights: Path, shared: Path):
    numbers = golden.load(shared, kind)
    description = read_description(weights / kind)
    assert isinstance(description.objective, ClassifyConfig)
    classifier = Classifier(description.model, description.objective, len(description.labels)).eval()
    classifier.load_state_dict(read_weights(weights / kind, "model"))
    for num_frames in (96, 128, 192):
        logits_BC = classifier(golden.patchify(numbers[f"input.T{num_frames}"]))
        # The golden README's figure: the official fp32 logits are 1.1e-6 from their fp64 values.
        torch.testing.assert_close(logits_BC, numbers[f"eval.T{num_frames}.logits.CLS_TOKEN"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_converted_students_and_teacher_fit_their_modules_and_the_teacher_is_the_official_one(
    kind: str, weights: Path, shared: Path
):
    numbers, description = golden.load(shared, kind), read_description(weights / kind)
    assert isinstance(description.objective, PretrainConfig)
    students = MaskedStudents(description.model, description.objective)
    students.load_state_dict(read_weights(weights / kind, "model"))
    teacher = Encoder(description.model).eval()
    teacher.load_state_dict(read_weights(weights / kind, "teacher"))
    tokens_BND = teacher(golden.patchify(numbers["input.source"]))
    last = f"fwd.teacher.block{description.model.depth - 1}.out"
    assert golden.rel_rms(tokens_BND, numbers[last]) < golden.REL_RMS


def test_settings_come_from_the_cfg(weights: Path):
    objective = read_description(weights / "asda_pretrain").objective
    assert isinstance(objective, PretrainConfig)
    assert objective.utterance_weight == 0.5 * 12 * 4  # cls_loss x clips x students
    assert (objective.students, objective.target_layers, objective.mask.block) == (4, 3, 3)
    assert (objective.decoder.layers, objective.decoder.groups, objective.decoder.width) == (2, 4, 96)
    described = read_description(weights / "eat_finetune")
    assert isinstance(described.objective, ClassifyConfig)
    assert (described.objective.layer_decay, described.objective.loss) == (0.65, "bce")
    assert (described.data.frames, described.model.heads) == (128, 4)


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("MEAN_POOLING", "mean"),
        ("PredictionMode.LIN_SOFTMAX", "linear_softmax"),
        ("CLS_TOKEN", "cls"),
        (1, "mean"),  # a pickled enum is a number
        (3, "linear_softmax"),
    ],
)
def test_pooling_follows_the_prediction_mode(mode: str | int, pooling: str, shared: Path, tmp_path: Path):
    def change(state: State) -> None:
        state["cfg"]["model"]["prediction_mode"] = mode

    converted(changed(shared, "eat_finetune", change, tmp_path / "x.pt"), "--out", tmp_path / "ours")
    objective = read_description(tmp_path / "ours").objective
    assert isinstance(objective, ClassifyConfig)
    assert objective.pooling == pooling


def finetune_config(init_from: Path, *overrides: str) -> Config:
    return load_config(
        ROOT / "configs" / "demo_finetune.json",
        [f"objective.init_from={init_from}", "model.width=96", "model.depth=3", "model.heads=4", *overrides],
    )


@pytest.mark.parametrize("stem", ["student", "teacher"])
def test_fine_tuning_starts_from_a_converted_encoder(stem: str, weights: Path, shared: Path):
    config = finetune_config(weights / "asda_pretrain", f"objective.init_weights={stem}")
    module = make_objective(config, ("cat", "dog"), torch.device("cpu")).module
    state = official(shared, "asda_pretrain")["model"]
    expected = state if stem == "student" else state["_ema"]
    assert torch.equal(module.state_dict()["encoder.blocks.2.attn.qk.weight"], expected["blocks.2.attn.qk.weight"])


def test_fine_tuning_starts_from_the_encoder_of_a_fine_tuned_checkpoint(weights: Path, shared: Path):
    module = make_objective(finetune_config(weights / "asda_finetune"), ("cat", "dog"), torch.device("cpu")).module
    expected = official(shared, "asda_finetune")["model"]["model.blocks.0.mlp.fc1.bias"]
    assert torch.equal(module.state_dict()["encoder.blocks.0.mlp.fc1.bias"], expected)


def test_a_teacher_that_is_not_there_is_one_sentence(weights: Path):
    config = finetune_config(weights / "asda_finetune", "objective.init_weights=teacher")
    with pytest.raises(UserError, match=r"has no teacher, .* \(objective.init_weights=student, "):
        make_objective(config, ("cat", "dog"), torch.device("cpu"))


# ---- other layouts and precisions


def as_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of EAT's model.safetensors there: "model." before all, no "modality_encoders.IMAGE.", pre_norm."""
    renamed = {}
    for key, tensor in state.items():
        short = key.removeprefix("model.").removeprefix(IMAGE).replace("context_encoder.norm", "pre_norm")
        if not short.startswith(("decoder.", "_ema")):
            renamed["model." + short] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["eat_pretrain", "eat_finetune"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_the_layout_of_hugging_face_gives_the_same_weights(
    kind: str, as_folder: bool, weights: Path, shared: Path, tmp_path: Path
):
    save_file(as_hugging_face(official(shared, kind)["model"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eat", "num_heads": 4, "norm_eps": 1e-6}))
    source = tmp_path if as_folder else tmp_path / "model.safetensors"
    printed = converted(source, "--out", tmp_path / "ours")
    expected = read_weights(weights / kind, "model")
    ours = read_weights(tmp_path / "ours", "model")
    if kind == "eat_pretrain":
        assert "it holds no decoder" in printed
        expected = {name: tensor for name, tensor in expected.items() if name.startswith("encoder.")}
    assert sorted(ours) == sorted(expected)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert read_description(tmp_path / "ours").model == read_description(weights / kind).model


def test_a_checkpoint_in_fp16_becomes_fp32(shared: Path, tmp_path: Path):
    def halve(state: State) -> None:  # as fairseq's fp16 training does: the teacher's fp32 copies the fixed positions
        state["model"] = {k: v.half() if isinstance(v, Tensor) else v for k, v in state["model"].items()}
        state["model"]["_ema"][POSITIONS] = state["model"][POSITIONS].float()

    path = changed(shared, "asda_pretrain", halve, tmp_path / "half.pt")
    assert "tensors of float16 became float32" in converted(path, "--out", tmp_path / "ours")
    expected = official(shared, "asda_pretrain")["model"]["blocks.0.attn.v.weight"].half().float()
    assert torch.equal(read_weights(tmp_path / "ours", "model")["encoder.blocks.0.attn.v.weight"], expected)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def in_one_storage(tensor: Tensor) -> Tensor:
    return torch.cat([torch.zeros(3, dtype=tensor.dtype), tensor.flatten()])[3:].view(tensor.shape)


@pytest.mark.parametrize("laid_out", [strided, transposed, channels_last, in_one_storage])
@pytest.mark.parametrize("kind", ["asda_pretrain", "eat_finetune"])
def test_tensors_that_lie_in_memory_in_another_way_are_converted_bit_for_bit(
    kind: str, laid_out: Callable[[Tensor], Tensor], weights: Path, shared: Path, tmp_path: Path
):
    def change(state: State) -> None:
        for content in (state["model"], state["model"].get("_ema", {})):
            content |= {key: laid_out(value) for key, value in content.items() if isinstance(value, Tensor)}

    path = changed(shared, kind, change, tmp_path / "odd.pt")
    found = tensors_of(torch.load(path, weights_only=True)).values()
    assert laid_out not in (strided, transposed) or not all(tensor.is_contiguous() for tensor in found)
    converted(path, "--out", tmp_path / "ours")
    for stem in ("model", "teacher") if "pretrain" in kind else ("model",):
        ours, expected = read_weights(tmp_path / "ours", stem), read_weights(weights / kind, stem)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_parts_of_other_objectives_are_left_out_by_name(shared: Path, tmp_path: Path):
    def add(state: State) -> None:
        state["model"] |= {"recon_proj.weight": torch.ones(32, 96), "center": torch.ones(1, 1, 96)}
        state["model"]["_ema"]["center"] = torch.ones(1, 1, 96)

    printed = converted(changed(shared, "eat_pretrain", add, tmp_path / "x.pt"), "--out", tmp_path / "ours")
    assert "recon_proj.weight belongs to an objective that asda does not have, and was left out" in printed
    assert "center belongs to" in printed


@pytest.mark.parametrize(
    ("num_classes", "flag", "mean", "frames", "loss"),
    [(527, None, -4.268, 1024, "bce"), (50, "esc50_eval", -6.627, 512, "ce"), (35, "spcv2_eval", -6.846, 128, "bce")],
)
def test_the_front_end_follows_the_dataset_by_flag_or_by_the_number_of_classes(
    num_classes: int, flag: str | None, mean: float, frames: int, loss: str, shared: Path, tmp_path: Path
):
    def classes(state: State) -> None:
        state["model"] |= {"head.weight": torch.ones(num_classes, 96), "head.bias": torch.ones(num_classes)}
        state["cfg"]["model"] |= {"mixup": 0.8, "target_length": frames} | ({flag: True} if flag else {})

    path = changed(shared, "eat_finetune", classes, tmp_path / "flagged.pt")
    converted(path, "--out", tmp_path / "flagged")
    bare = changed(shared, "eat_finetune", lambda s: (classes(s), s.pop("cfg")), tmp_path / "bare.pt")
    converted(bare, "--out", tmp_path / "bare", "--heads", "4")
    for folder in ("flagged", "bare"):
        described = read_description(tmp_path / folder)
        assert (described.data.log_mel.mean, described.data.frames) == (mean, frames)
        assert isinstance(described.objective, ClassifyConfig)
        assert described.objective.loss == (loss if folder == "flagged" else "bce")
        assert (described.labels == audioset_labels()) == (num_classes == 527)
        assert len(described.labels) == num_classes


def test_what_the_user_says_goes_before_the_file(shared: Path, tmp_path: Path):
    (tmp_path / "labels.txt").write_text("\n".join(f"bird {i}" for i in range(13)) + "\n")
    options = ("--mean", "-7", "--std", "5", "--labels", tmp_path / "labels.txt", "--preset", "paper", "--heads", "2")
    printed = converted(shared / "golden" / "asda_finetune_official.pt", "--out", tmp_path / "x", *options)
    described = read_description(tmp_path / "x")
    assert (described.data.log_mel.mean, described.data.log_mel.std, described.labels[12]) == (-7, 5, "bird 12")
    assert (described.preset, described.model.attention_lambda, described.model.heads) == ("paper", 0.3, 2)
    assert "log-mel mean" not in printed


# ---- what is broken, or does not fit


def refused(*arguments: object) -> str:
    """The one sentence of a conversion that must fail, and leave nothing."""
    done = convert(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("blocks.1.norm1.weight"), "blocks.1.norm1.weight [96] is missing"),
        (lambda m: m.pop(IMAGE + "extra_tokens"), f"{IMAGE}extra_tokens is missing; it begins with {IMAGE}local_enc"),
        (lambda m: m.pop(POSITIONS), f"{POSITIONS} is missing"),
        (lambda m: m.update(alibi=torch.ones(3)), "alibi [3] is unexpected"),
        (lambda m: m.update({"blocks.0.attn.v.bias": torch.ones(5)}), "blocks.0.attn.v.bias [5] should be [96]"),
        (lambda m: m.update({IMAGE + "extra_tokens": torch.ones(96)}), "extra_tokens [96] should have 3 dimensions"),
        (
            lambda m: [m.pop(key) for key in list(m) if key.startswith("blocks.1.mlp")],
            "blocks.1.mlp.fc1.weight [336, 96] is missing, blocks.1.mlp.fc1.bias [336] is missing, "
            "blocks.1.mlp.fc2.weight [96, 336] is missing, and 1 more",
        ),
        (lambda m: m["_ema"].pop("blocks.2.mlp.fc2.bias"), "_ema of x.pt does not fit: blocks.2.mlp.fc2.bias [96] is"),
        (lambda m: m.update({"blocks.0.norm1.weight": "text"}), "blocks.0.norm1.weight (str) should be [96]"),
        (lambda m: m["blocks.0.norm1.weight"].fill_(float("nan")), "values in blocks.0.norm1.weight that are not fin"),
        (lambda m: m["_ema"]["blocks.0.norm2.bias"].fill_(float("inf")), "values in blocks.0.norm2.bias that are not"),
        (lambda m: m[POSITIONS].mul_(1.001), "another table of positions"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Change, sentence: str, shared: Path, tmp_path: Path):
    path = changed(shared, "asda_pretrain", lambda state: change(state["model"]), tmp_path / "x.pt")
    assert sentence in refused(path, "--out", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer_norm_first": True}, "model.layer_norm_first True; asda's encoder has False"),
        ({"norm_eps": 1e-5}, "model.norm_eps 1e-05; asda's encoder has 1e-06"),
        ({"num_heads": 7}, "model.width 96 must be a multiple of model.heads 7"),
        ({"num_heads": -4}, "model.heads"),
        ({"clone_batch": 0}, "objective.students"),
    ],
)
def test_a_cfg_of_another_network_is_refused(change: State, sentence: str, shared: Path, tmp_path: Path):
    path = changed(shared, "asda_pretrain", lambda state: state["cfg"]["model"].update(change), tmp_path / "x.pt")
    assert sentence in refused(path, "--out", tmp_path / "out")


def test_another_pre_training_is_told_and_taken(shared: Path, tmp_path: Path):
    def change(state: State) -> None:
        state["cfg"]["model"]["end_of_block_targets"] = True

    printed = converted(changed(shared, "eat_pretrain", change, tmp_path / "x.pt"), "--out", tmp_path / "ours")
    assert "model.end_of_block_targets True, where asda has False" in printed


def test_files_of_other_kinds_are_one_sentence(shared: Path, tmp_path: Path):
    whole = (shared / "golden" / "asda_pretrain_official.pt").read_bytes()
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.weight": torch.ones(64)}, tmp_path / "resnet.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    for name, content in {"text.pt": b"not weights\n", "empty.pt": b"", "cut.pt": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    for name, sentence in {
        "resnet.pt": "resnet.pt is not a checkpoint of EAT, ASDA or SSLAM: modality_encoders.IMAGE.extra_tokens is "
        "missing; it begins with conv1.weight [64, 3, 7, 7], bn1.weight [64]",
        "tensor.pt": "holds a Tensor",
        "text.pt": "is not a whole PyTorch checkpoint",
        "empty.pt": "is empty",
        "cut.pt": "is not a whole PyTorch checkpoint",
        "cut.safetensors": "is not a whole safetensors file",
        "absent.pt": "No such file",
        ".": "is missing",
    }.items():
        assert sentence in refused(tmp_path / name, "--out", tmp_path / "out"), name


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("made_by_the_pickle", "w")


def test_a_checkpoint_that_would_run_code_is_refused(shared: Path, tmp_path: Path):
    path = changed(shared, "asda_pretrain", lambda state: state.update(extra_state=Evil()), tmp_path / "evil.pt")
    assert "evil.pt asks to run io.open" in refused(path, "--out", tmp_path / "out")
    assert not Path("made_by_the_pickle").exists()


def test_the_program_itself_leaves_with_code_2_and_one_line(tmp_path: Path):
    (tmp_path / "text.pt").write_text("not weights")
    command = [
        sys.executable,
        "-m",
        "asda",
        "convert",
        tmp_path / "text.pt",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/text.pt is not a whole PyTorch checkpoint")


def test_a_cfg_without_end_is_one_sentence(shared: Path, tmp_path: Path):
    path = changed(shared, "asda_pretrain", lambda state: state["cfg"].update(again=state["cfg"]), tmp_path / "x.pt")
    assert "nested without end" in refused(path, "--out", tmp_path / "out")


def test_labels_of_another_number_are_refused(shared: Path, tmp_path: Path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    source = shared / "golden" / "asda_finetune_official.pt"
    sentence = refused(source, "--out", tmp_path / "out", "--labels", tmp_path / "labels.txt")
    assert "--labels names 2 classes, the checkpoint has 13" in sentence
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    sentence = refused(source, "--out", tmp_path / "out", "--labels", tmp_path / "labels.txt")
    assert "labels.txt is no UTF-8 text" in sentence


def test_a_byte_order_mark_is_no_part_of_a_class_name(shared: Path, tmp_path: Path):
    names = [f"bird {i}" for i in range(13)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n", encoding="utf-8-sig")
    source = shared / "golden" / "asda_finetune_official.pt"
    converted(source, "--out", tmp_path / "out", "--labels", tmp_path / "labels.txt")
    assert read_description(tmp_path / "out").labels == tuple(names)


def test_a_class_that_is_named_twice_or_a_list_that_is_not_there_is_refused(shared: Path, tmp_path: Path):
    source, labels = shared / "golden" / "asda_finetune_official.pt", tmp_path / "labels.txt"
    assert f"--labels {labels}: no such file" in refused(source, "--out", tmp_path / "out", "--labels", labels)
    labels.write_text("\n".join([*(f"bird {i}" for i in range(12)), "bird 3"]))
    sentence = refused(source, "--out", tmp_path / "out", "--labels", labels)
    assert f"--labels {labels} line 13 is empty or repeats a name ('bird 3')" in sentence


def test_weights_that_are_not_there_are_one_sentence(tmp_path: Path):
    sentence = refused(tmp_path / "model.safetensors", "--out", tmp_path / "out")
    assert f"{tmp_path}/model.safetensors: no such file" in sentence


@pytest.mark.parametrize("to", ["asda", "official"])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(to: str, weights: Path, shared: Path, tmp_path: Path):
    source = shared / "golden" / "asda_pretrain_official.pt" if to == "asda" else weights / "asda_pretrain"
    with room_for(65_536):
        sentence = refused(source, "--to", to, "--out", tmp_path / "full" / "out")
    assert "free space" in sentence
    assert not list((tmp_path / "full").iterdir())


def test_our_own_weights_are_not_taken_for_official_ones(weights: Path, tmp_path: Path):
    assert "asda's own layout" in refused(weights / "asda_pretrain", "--out", tmp_path / "out")


def test_nothing_is_replaced_without_force_and_no_other_folder_with_it(shared: Path, weights: Path, tmp_path: Path):
    source, out = shared / "golden" / "eat_finetune_official.pt", tmp_path / "out"
    converted(source, "--out", out)
    assert "exists; --force replaces it" in refused(source, "--out", out)
    converted(source, "--out", out, "--force")
    (out / "thesis.txt").write_text("years of work")
    assert "not a folder of weights alone" in refused(source, "--out", out, "--force")
    assert (out / "thesis.txt").exists()
    (tmp_path / "x.pt").write_text("precious")
    assert "exists" in refused(weights / "eat_finetune", "--to", "official", "--out", tmp_path / "x.pt")
    converted(weights / "eat_finetune", "--to", "official", "--out", tmp_path / "x.pt", "--force")
    assert "exists" in refused(weights / "eat_finetune", "--to", "official", "--out", out, "--force")


def test_models_that_the_official_code_cannot_compute_are_refused(shared: Path, tmp_path: Path):
    source = shared / "golden" / "asda_pretrain_official.pt"
    converted(source, "--out", tmp_path / "paper", "--preset", "paper")
    sentence = refused(tmp_path / "paper", "--to", "official", "--out", tmp_path / "x.pt")
    assert "model.attention_lambda 0.1 fixed, this model has 0.3" in sentence


def test_weights_without_a_decoder_do_not_become_official_pre_training(shared: Path, tmp_path: Path):
    save_file(as_hugging_face(official(shared, "eat_pretrain")["model"]), tmp_path / "model.safetensors")
    converted(tmp_path / "model.safetensors", "--out", tmp_path / "ours", "--heads", "4")
    sentence = refused(tmp_path / "ours", "--to", "official", "--out", tmp_path / "x.pt")
    assert "the weights are not whole: decoder.convs.0.weight" in sentence
