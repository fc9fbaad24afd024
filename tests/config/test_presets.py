"""Presets and sizes: the published values, what departs from them, and what a checkpoint records."""

import json
from pathlib import Path

import pytest
import torch

from asda.config.model import PretrainConfig
from asda.config.presets import PRESETS, SIZES, departures, filled
from asda.config.run import dump_config, load_config
from asda.models.attention import Attention, LearnedLambda, PerHeadNorm
from asda.models.encoder import Encoder

AS2M = Path(__file__).parents[2] / "configs" / "as2m.json"


@pytest.mark.parametrize(
    ("preset", "attention", "mlp_ratio", "utterance_weight"),
    [  # the published figures: ASDA's code, its paper, EAT
        ("released", (0.1, "joint", 0.95), 3.5, 0.5 * 12 * 16),
        ("paper", (0.3, "joint", 0.95), 3.5, 0.5 * 12 * 16),
        ("learned", ("learned", "per_head", "by_depth"), 3.5, 0.5 * 12 * 16),
        ("eat", ("absent", "none", 1.0), 4.0, 1.0 * 12 * 16),
    ],
)
def test_a_preset_has_the_published_values(
    preset: str, attention: tuple[object, ...], mlp_ratio: float, utterance_weight: float
):
    config = load_config(AS2M, [f"preset={preset}"])
    model, objective = config.model, config.objective
    assert (model.attention_lambda, model.attention_norm, model.attention_scale) == attention
    assert model.mlp_ratio == mlp_ratio
    assert isinstance(objective, PretrainConfig)
    assert objective.utterance_weight == utterance_weight


@pytest.mark.parametrize(
    ("size", "model", "decoder", "mask", "rest"),
    [
        ("base", (768, 12, 12), (6, 768, 3), (0.8, 0.07), (12, 100_000)),
        ("large", (1024, 24, 16), (3, 1024, 5), (0.75, 0.1), (24, 150_000)),
        ("small", (384, 12, 6), (6, 384, 3), (0.8, 0.07), (12, 100_000)),
        ("tiny", (192, 12, 3), (6, 192, 3), (0.8, 0.07), (12, 100_000)),
    ],
)
def test_a_size_has_the_published_dimensions(
    size: str, model: tuple[int, ...], decoder: tuple[int, ...], mask: tuple[float, ...], rest: tuple[int, ...]
):
    config = load_config(AS2M, [f"size={size}"])
    objective = config.objective
    assert isinstance(objective, PretrainConfig)
    assert (config.model.width, config.model.depth, config.model.heads) == model
    assert (objective.decoder.layers, objective.decoder.width, objective.decoder.kernel) == decoder
    assert (objective.mask.ratio, objective.mask.adjust) == mask
    assert (objective.target_layers, objective.ema.anneal_steps) == rest


def test_a_single_value_can_be_changed_and_the_change_is_recorded(tmp_path: Path):
    config = load_config(AS2M, ["model.attention_lambda=0.2", "objective.mask.ratio=0.7"])
    (tmp_path / "config.json").write_text(dump_config(config))
    again = load_config(tmp_path / "config.json")
    assert again == config
    assert (again.preset, again.size) == ("released", "base")
    assert departures(again.model_dump()) == [
        "model.attention_lambda 0.2 (released: 0.1)",
        "objective.mask.ratio 0.7 (base: 0.8)",
    ]


def test_what_a_run_records_is_complete_and_does_not_depend_on_later_presets():
    recorded = json.loads(dump_config(load_config(AS2M, ["preset=eat"])))
    for preset in PRESETS:
        for size in SIZES:
            renamed = recorded | {"preset": preset, "size": size}
            assert filled(renamed) == renamed


def test_a_published_configuration_departs_from_nothing():
    for preset in PRESETS:
        for size in SIZES:
            path = AS2M.parent / ("esc50_ast.json" if preset == "ast" else "as2m.json")
            config = load_config(path, [f"preset={preset}", f"size={size}"])
            assert departures(config.model_dump()) == []


def test_the_preset_of_ast_and_its_architecture_imply_each_other():
    path = AS2M.parent / "esc50_asda.json"
    by_preset = load_config(path, ["preset=ast"])
    assert by_preset.model.architecture == "ast"
    assert by_preset.model.frames == by_preset.data.frames
    by_name = load_config(path, ["preset=released", "model.architecture=ast"])
    assert by_name.model == by_preset.model.model_copy(update={"mlp_ratio": by_name.model.mlp_ratio})
    assert "model.architecture ast (released: asda)" in departures(by_name.model_dump())
    assert filled({"model": {"architecture": "ast"}})["preset"] == "ast"


def test_a_configuration_from_before_there_were_architectures_is_that_of_asda():
    recorded = json.loads(dump_config(load_config(AS2M)))
    del recorded["model"]["architecture"]
    assert filled(recorded)["model"]["architecture"] == "asda"


def test_a_classifier_takes_no_value_of_the_students_objective():
    config = load_config(AS2M.parent / "demo_finetune.json", ["preset=eat"])
    assert config.model.attention_lambda == "absent"
    assert not any(line.startswith("objective") for line in departures(config.model_dump()))


def test_each_preset_builds_its_own_attention():
    def first_attention(preset: str) -> Attention:
        model = load_config(AS2M, [f"preset={preset}", "size=tiny", "model.depth=1", "objective.target_layers=1"]).model
        block = Encoder(model).blocks[0]
        return block.attn  # type: ignore[union-attr,return-value]

    released, learned, eat = (first_attention(preset) for preset in ("released", "learned", "eat"))
    assert isinstance(released.norm, torch.nn.LayerNorm)
    assert (released.lam, released.scale, released.qk.out_features) == (0.1, 0.95, 4 * 192)
    assert isinstance(learned.norm, PerHeadNorm)
    assert isinstance(learned.lam, LearnedLambda)
    assert learned.scale == pytest.approx(1 - 0.2)
    assert isinstance(eat.norm, torch.nn.Identity)
    assert (eat.scale, eat.qk.out_features) == (1.0, 2 * 192)
