"""The configurations of the papers hold the papers' numbers, and say where those come from."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from asda.config.model import AstConfig, ClassifyConfig, PretrainConfig
from asda.config.run import Config, OptimizerConfig, StepDecayConfig, dump_config, load_config
from asda.engine.zero import learning_rate
from asda.official.huggingface_ast import LOG_MEL as LOG_MEL_OF_CLASSES

CONFIGS = Path(__file__).parents[2] / "configs"
STORY = {"what", "source", "expected", "hardware", "command"}

# Steps, warm-up, peak rate, clips a step; frames; mixup's alpha; SpecAugment's shares of mel bins and of frames; loss,
# smoothing; seed: as the released fine-tuning scripts have them.
FINE_TUNING = {
    "as2m_asda": (600_000, 60_000, 5e-5, 48, 1024, 0.8, 0.2, 0.2, "bce", 0.0, 1),
    "as20k_asda": (60_000, 6_000, 5e-5, 32, 1024, 0.8, 0.2, 0.2, "bce", 0.0, 1),
    "esc50_asda": (4_000, 400, 5e-5, 48, 512, 0.0, 0.4, 0.4, "ce", 0.1, 1),
    "spc2_asda": (80_000, 8_000, 2e-4, 256, 128, 0.8, 0.2, 0.2, "bce", 0.0, 42),
}
# Steps, warm-up, clips a step, weight of the utterance loss over 12 clips x 16 students, softmax maps
PRE_TRAINING = {"as2m": (800_000, 106_666, 48, 0.5, 2), "as2m_eat": (400_000, 53_333, 48, 1.0, 1)}
LOG_MEL = {1024: (-4.268, 4.569), 512: (-6.627, 5.359), 128: (-6.846, 5.565)}  # of AudioSet, ESC-50, Speech Commands
# Epochs, clips an epoch, clips a step, rate; frames; mel bins and frames that SpecAugment masks at most; share of clips
# that are mixed; loss: as AST's released scripts have them, and after them HAM-AST
AST = {
    "esc50_ast": (25, 1600, 48, 1e-5, 512, 24, 96, 0.0, "ce"),
    "spc2_ast": (30, 84_843, 128, 2.5e-4, 128, 48, 48, 0.6, "bce"),
}
AST |= {name.replace("_ast", "_ham"): recipe for name, recipe in AST.items()}
AST_LOG_MEL = {512: (-6.6268077, 5.358466), 128: (-6.845978, 5.5654526)}


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json", [])


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_fine_tuning_is_the_released_one(name: str) -> None:
    steps, warmup, lr, batch, frames, alpha, mel, time, loss, smoothing, seed = FINE_TUNING[name]
    config = config_of(name)
    optimizer, data, augment = config.optimizer, config.data, config.data.augment
    assert isinstance(config.objective, ClassifyConfig)
    assert (optimizer.steps, optimizer.warmup_steps, optimizer.lr, optimizer.batch) == (steps, warmup, lr, batch)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.95), 1e-8, 0.05, 0.0)
    assert (optimizer.min_lr, optimizer.lr_floor) == (1e-6, "absolute")
    assert (data.frames, data.pad_log_mel, config.run.seed) == (frames, 0.0, seed)
    assert (augment.mixup.alpha, augment.mixup.probability if alpha else 0.9) == (alpha, 0.9)
    spec_augment = augment.spec_augment
    assert (spec_augment.mel_ratio, spec_augment.frame_ratio, spec_augment.order) == (mel, time, "after_mixup")
    assert (augment.roll, augment.magnitude) == (True, 10.0)
    assert (augment.frame_noise, augment.frame_roll) == ((0.1, 10) if name == "spc2_asda" else (0.0, 0))
    objective = config.objective
    assert (objective.loss, objective.label_smoothing, objective.pooling) == (loss, smoothing, "cls")
    assert (objective.layer_decay, objective.drop_path, objective.init_weights) == (0.65, 0.1, "student")
    balanced = ("balanced", 200_000, False)
    order = (data.order.mode, data.order.draws_per_epoch, data.order.replacement)
    assert order == (balanced if name == "as2m_asda" else ("shuffled", None, False))


@pytest.mark.parametrize("name", PRE_TRAINING)
def test_a_pre_training_is_the_released_one(name: str) -> None:
    steps, warmup, batch, utterance, maps = PRE_TRAINING[name]
    config = config_of(name)
    optimizer, objective, model = config.optimizer, config.objective, config.model
    assert isinstance(objective, PretrainConfig)
    assert (optimizer.steps, optimizer.warmup_steps, optimizer.batch) == (steps, warmup, batch)
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.clip) == (5e-4, 0.0, 0.05, 4.0)
    assert (optimizer.betas, optimizer.eps, config.run.seed) == ((0.9, 0.95), 1e-8, 1)
    assert (objective.students, objective.utterance_weight) == (16, utterance * 12 * 16)
    assert (objective.mask.ratio, objective.mask.adjust, objective.mask.block) == (0.8, 0.07, 5)
    ema, decoder = objective.ema, objective.decoder
    assert (ema.decay, ema.end_decay, ema.anneal_steps) == (0.9998, 0.99999, 100_000)
    assert (decoder.layers, decoder.kernel, decoder.groups, decoder.noise_std) == (6, 3, 16, 0.01)
    assert (model.width, model.depth, model.heads) == (768, 12, 12)
    assert (1 if model.attention_lambda == "absent" else 2, model.mlp_ratio) == (maps, 3.5 if maps == 2 else 4.0)


@pytest.mark.parametrize("name", AST)
def test_a_fine_tuning_of_ast_is_the_released_one(name: str) -> None:
    epochs, clips, batch, lr, frames, mel, time, mixed, loss = AST[name]
    config = config_of(name)
    optimizer, augment, objective, model = config.optimizer, config.data.augment, config.objective, config.model
    an_epoch = math.ceil(clips / batch)  # the last batch of an epoch is smaller
    assert (optimizer.steps, optimizer.batch, optimizer.lr) == (epochs * an_epoch, batch, lr)
    assert optimizer.step_decay is not None
    assert optimizer.step_decay.model_dump() == {"factor": 0.85, "every": an_epoch, "start": 5 * an_epoch}
    assert (optimizer.betas, optimizer.weight_decay, optimizer.warmup_steps) == ((0.95, 0.999), 5e-7, 0)
    assert (optimizer.clip, optimizer.min_lr, config.data.frames) == (0.0, 0.0, frames)
    spec_augment = augment.spec_augment
    assert (spec_augment.mel_ratio * 128, spec_augment.frame_ratio * frames) == (mel, time)
    assert spec_augment.order == "before_normalisation"
    mixup = augment.mixup
    assert (mixup.alpha, mixup.probability if mixed else 0.0) == (10.0 if mixed else 0.0, mixed)
    assert (augment.roll, augment.magnitude) == (False, 0.0)
    assert (augment.frame_noise, augment.frame_roll) == ((0.1, 10) if name.startswith("spc2") else (0.0, 0))
    assert isinstance(objective, ClassifyConfig)
    assert (objective.loss, objective.label_smoothing, objective.pooling, objective.layer_decay) == (loss, 0, "cls", 1)
    judged = (config.data.valid, config.data.test, config.run.keep_best)
    words = ("shards/speechcommands:valid", "shards/speechcommands:test", "accuracy")
    assert judged == (words if loss == "bce" else ("shards/esc50:fold1", "", ""))
    assert isinstance(model, AstConfig)
    assert (model.width, model.depth, model.heads, model.mlp_ratio) == (768, 12, 12, 4.0)
    assert (model.patch, model.time_stride, model.mel_stride) == (16, 10, 10)
    assert (model.conformer.blocks, model.channel_attention.enabled) == ((6, True) if "ham" in name else (0, False))


def test_the_grid_of_ham_ast_is_the_papers() -> None:
    done = subprocess.run(
        ["bash", "runs/ham_grid.sh", "configs/esc50_ham.json", "run.seed=7"],
        cwd=CONFIGS.parent,
        env={**os.environ, "LAUNCH": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    trained = [line.split() for line in done.stdout.splitlines() if line.startswith("asda/train.py")]
    configs = [load_config(CONFIGS.parent / words[2], words[3:]) for words in trained]
    found = []
    for config in configs:
        assert isinstance(config.model, AstConfig)
        found.append((config.model.conformer.blocks, config.model.channel_attention.enabled))
        assert config.run.seed == 7
    assert found == [(0, False), (0, True), (3, False), (6, True)]
    assert len({config.run.folder for config in configs}) == 4
    assert done.stdout.count("asda/evaluate.py --checkpoint runs/esc50_ham/") == 4


@pytest.mark.parametrize(("kept", "option"), [("accuracy", " --best"), ("", "")])
def test_the_grid_evaluates_the_checkpoint_that_a_run_has_kept_as_its_best(
    kept: str, option: str, tmp_path: Path
) -> None:
    variants = ("ast", "ast_channel_attention", "ast_3_conformer", "ast_6_conformer_channel_attention")
    for variant in variants:  # as training leaves it
        (tmp_path / variant).mkdir()
        config = load_config(CONFIGS / "spc2_ham.json", [f"run.keep_best={kept}"])
        (tmp_path / variant / "config.json").write_text(dump_config(config))
    done = subprocess.run(
        ["bash", "runs/ham_grid.sh", "configs/spc2_ham.json", f"run.keep_best={kept}"],
        cwd=CONFIGS.parent,
        env={**os.environ, "LAUNCH": "echo", "RUNS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("asda/evaluate.py")]
    assert lines == [f"asda/evaluate.py --checkpoint {tmp_path}/{variant}{option}" for variant in variants]


@pytest.mark.parametrize("name", [*FINE_TUNING, *PRE_TRAINING, *AST])
def test_a_published_configuration_tells_its_story_and_its_front_end(name: str) -> None:
    config = config_of(name)
    assert set(config.about) == STORY
    assert f"configs/{name}.json" in config.about["command"]
    assert "not reproduced here" in config.about["expected"]
    assert config.data.log_mel != "dataset"
    published = AST_LOG_MEL if name in AST else LOG_MEL
    assert (config.data.log_mel.mean, config.data.log_mel.std) == published[config.data.frames]
    given: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    assert config.run.folder == f"runs/{name}" == given["run"]["folder"]


@pytest.mark.parametrize(("warmup", "min_lr"), [(0, 0.0), (10, 1e-4)])
def test_steps_are_those_of_torchs_scheduler_after_the_warm_up(warmup: int, min_lr: float) -> None:
    decay = StepDecayConfig(factor=0.85, every=7, start=30)
    settings = {"steps": 100, "warmup_steps": warmup, "lr": 1e-3, "min_lr": min_lr, "batch": 1}
    config = OptimizerConfig(**settings, schedule="steps", step_decay=decay)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [*range(30, 100, 7)], gamma=0.85)
    for step in range(100):
        expected = max(min_lr, scheduler.get_last_lr()[0]) if step >= warmup else 1e-3 * step / warmup
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)
        assert learning_rate(config, step, 0.5) == pytest.approx(expected * 0.5, rel=1e-12)  # the floor is scaled
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "given", [{"schedule": "steps"}, {"step_decay": StepDecayConfig(factor=0.5, every=1, start=0)}]
)
def test_steps_and_their_sizes_need_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"schedule steps needs optimizer\.step_decay"):
        OptimizerConfig(steps=1, warmup_steps=0, lr=1.0, batch=1, **given)


def test_the_floor_of_the_rate_is_scaled_with_its_layer_or_the_same_for_all() -> None:
    settings = {"steps": 1000, "warmup_steps": 100, "lr": 5e-5, "min_lr": 1e-6, "batch": 1}
    scaled, absolute = OptimizerConfig(**settings), OptimizerConfig(**settings, lr_floor="absolute")
    for step in (0, 50, 100, 550, 999, 1000):
        for scale in (1.0, 0.65, 0.65**9, 0.65**10, 0.65**12):
            peak = 5e-5 * scale
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 900))
            floor = min(1e-6, peak)  # fairseq lowers the floor to the peak, so that the rate stays there
            expected = peak * step / 100 if step < 100 else floor + (peak - floor) * cosine
            assert learning_rate(absolute, step, scale) == pytest.approx(expected, rel=1e-12)
            assert learning_rate(scaled, step, scale) == pytest.approx(learning_rate(scaled, step) * scale, rel=1e-12)
    # The lowest three of twelve blocks, as released
    constant = [block for block in range(12) if learning_rate(absolute, 1000, 0.65 ** (12 - block)) < 1e-6]
    assert constant == [0, 1, 2]


def test_the_converter_of_ast_assumes_the_figures_of_the_configurations() -> None:
    assert [LOG_MEL_OF_CLASSES[classes] for classes in (50, 35)] == [AST_LOG_MEL[512], AST_LOG_MEL[128]]
