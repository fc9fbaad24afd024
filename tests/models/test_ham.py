"""HAM-AST: its Conformer against torchaudio's and a naive loop, its channel attention against its formula."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT, launch
from overfitting import losses_of
from safetensors.torch import load_file
from test_ast import CLASSES, FRAMES, mels, network, patches_of, tiny
from torch import Tensor, nn
from torchaudio.models.conformer import ConformerLayer, _ConvolutionModule, _FeedForwardModule

import asda
from asda.checkpoint.weights import write_weights
from asda.config.data import InputConfig, LogMelStats
from asda.config.model import AstConfig, ChannelAttentionConfig, ConformerConfig
from asda.config.run import Description
from asda.models.costs import network_costs
from asda.models.encoder import sinusoids
from asda.models.ham import (
    ChannelAttention,
    Conformer,
    ConformerBlock,
    Convolution,
    FeedForward,
    Ham,
    RelativeAttention,
)
from asda.objectives import make_objective
from asda.run.log import read_metrics

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

WIDTH, HEADS, TIME, MEL = 12, 3, 5, 3
FP64 = 1e-12  # sums of up to 64 terms of size 1, of a dozen operations: 1e-13 with 2^-53 each


def ast(**conformer: object) -> AstConfig:
    """Five time patches of 64 frames, three of mel; without dropout unless it is asked for."""
    settings = {"blocks": 1, "kernel": 3, "dropout": 0.0} | conformer
    return AstConfig(
        architecture="ast",
        width=WIDTH,
        heads=HEADS,
        depth=1,
        frames=64,
        mel_stride=56,
        conformer=ConformerConfig(**settings),
    )


def randomised(module: nn.Module) -> nn.Module:
    """In fp64, every parameter drawn anew, norms and biases too."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def tokens() -> Tensor:
    return torch.randn(2, 2 + TIME * MEL, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy parameter by parameter, in the order in which both name them; linear layers may be convolutions of 1."""
    for to, taken in zip(theirs.parameters(), ours.parameters(), strict=True):
        with torch.no_grad():
            to.copy_(taken.view_as(to))


# ---- the parts of a block


def test_the_feed_forward_module_is_torchaudios():
    ours, theirs = randomised(FeedForward(WIDTH, 20, 0.0)), _FeedForwardModule(WIDTH, 20).double()
    same_weights(ours, theirs)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=FP64, atol=FP64)


def test_the_convolution_along_the_sequence_is_torchaudios():
    config = ast(axis="sequence", norm="group", kernel=7)
    ours = randomised(Convolution(WIDTH, config.grid, config.conformer))
    theirs = _ConvolutionModule(WIDTH, WIDTH, 7, bias=True, use_group_norm=True).double()
    same_weights(ours, theirs)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=FP64, atol=FP64)


def test_the_convolution_along_time_is_that_of_each_band_and_of_cls_and_dist_alone():
    # The norm of each token, so that nothing but the convolution joins tokens: bands are then sequences of their own.
    along = {axis: ast(axis=axis, kernel=5) for axis in ("time", "sequence")}
    modules = {axis: randomised(Convolution(WIDTH, c.grid, c.conformer)) for axis, c in along.items()}
    found_BSD = modules["time"](tokens())
    pieces = [(0, 1), (1, 2), *((2 + band * TIME, 2 + (band + 1) * TIME) for band in range(MEL))]
    expected_BSD = torch.cat([modules["sequence"](tokens()[:, first:last]) for first, last in pieces], dim=1)
    torch.testing.assert_close(found_BSD, expected_BSD, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("axis", ["time", "sequence"])
def test_relative_attention_is_the_formula_of_transformer_xl(axis: str):
    conformer = randomised(Conformer(ast(axis=axis)))
    attention = conformer.blocks[0].attention
    assert isinstance(attention, RelativeAttention)
    found_BSD = attention(tokens(), *distances_of(conformer))
    torch.testing.assert_close(found_BSD, naive_attention(attention, tokens(), axis), rtol=1e-10, atol=1e-10)


def distances_of(conformer: Conformer) -> tuple[Tensor, Tensor]:
    """What the blocks are given, with the sines in fp64 as in the loop below."""
    seen = []
    handle = conformer.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[1:]))
    conformer(tokens())
    handle.remove()
    table_LD, number_SS = seen[0]
    farthest = len(table_LD) // 2
    return waves_of(torch.arange(-farthest, farthest + 1)), number_SS


def waves_of(distance_L: Tensor) -> Tensor:
    phase_LW = distance_L[:, None] / 10_000 ** (torch.arange(WIDTH // 2).double() / (WIDTH // 2))
    return torch.cat([phase_LW.sin(), phase_LW.cos()], dim=1)


def naive_attention(module: RelativeAttention, tokens_BSD: Tensor, axis: str) -> Tensor:
    """Query by query and key by key, equation (4) of Transformer-XL with its four terms (a) to (d)."""
    size = WIDTH // HEADS
    q_BSD, k_BSD, v_BSD = module.qkv(module.norm(tokens_BSD)).chunk(3, dim=-1)
    mixed_BSD = torch.zeros_like(tokens_BSD)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        q, k, v = q_BSD[..., part], k_BSD[..., part], v_BSD[..., part]
        u, w = module.u[head, 0], module.v[head, 0]
        logits_BSS = torch.zeros(*tokens_BSD.shape[:2], tokens_BSD.shape[1], dtype=torch.float64)
        for i in range(tokens_BSD.shape[1]):
            for j in range(tokens_BSD.shape[1]):
                r = module.distance.weight[part] @ waves_of(torch.tensor([distance(i, j, axis)]))[0]
                logits_BSS[:, i, j] = (q[:, i] * k[:, j]).sum(-1) + q[:, i] @ r + k[:, j] @ u + r @ w
        mixed_BSD[..., part] = (logits_BSS / math.sqrt(size)).softmax(-1) @ v
    return module.proj(mixed_BSD)


def distance(query: int, key: int, axis: str) -> int:
    """Along the sequence; or in time patches, where CLS and DIST are at no distance from anything."""
    if axis == "sequence":
        return query - key
    return 0 if min(query, key) < 2 else (query - 2) % TIME - (key - 2) % TIME


def test_sines_and_cosines_are_of_the_distance():
    found_LD = sinusoids(torch.arange(-3, 4), WIDTH)
    torch.testing.assert_close(found_LD, waves_of(torch.arange(-3, 4)).float(), rtol=0, atol=2**-24)


def test_a_block_without_attention_is_torchaudios_without_attention():
    """Both halves of the feed-forward, the convolution, the norm, the residuals between them."""
    config = ast(axis="sequence", norm="group", kernel=7, mlp_ratio=2)
    ours = randomised(ConformerBlock(config))
    theirs = ConformerLayer(WIDTH, 2 * WIDTH, HEADS, 7, use_group_norm=True).double()
    assert isinstance(ours, ConformerBlock)
    for part, of_theirs in (
        (ours.first, theirs.ffn1),
        (ours.convolution, theirs.conv_module),
        (ours.second, theirs.ffn2),
        (ours.norm, theirs.final_layer_norm),
    ):
        same_weights(part, of_theirs)
    for silenced in (ours.attention.proj, theirs.self_attn.out_proj):
        nn.init.zeros_(silenced.weight)
        nn.init.zeros_(silenced.bias)
    found_BSD = ours(tokens(), *distances_of(Conformer(config).double()))
    torch.testing.assert_close(
        found_BSD, theirs(tokens().transpose(0, 1), None).transpose(0, 1), rtol=1e-11, atol=1e-11
    )


# ---- channel attention


def channel_weights(**settings: object) -> tuple[ChannelAttention, Tensor]:
    config = ChannelAttentionConfig(**({"enabled": True, "reduction": 4} | settings))
    module = randomised(ChannelAttention(WIDTH, config))
    assert isinstance(module, ChannelAttention)
    return module, module.weights(tokens())


@pytest.mark.parametrize("pooled", ["patches", "all"])
def test_channel_attention_is_cbams_by_default(pooled: str):
    module, found_BD = channel_weights(tokens=pooled)
    x_BND = tokens()[:, 2:] if pooled == "patches" else tokens()

    def layers(x_BD: Tensor) -> Tensor:
        return (x_BD @ module.fc1.weight.T + module.fc1.bias).clamp(min=0) @ module.fc2.weight.T + module.fc2.bias

    expected_BD = 1 / (1 + (-layers(x_BND.sum(1) / x_BND.shape[1]) - layers(x_BND.max(1).values)).exp())
    torch.testing.assert_close(found_BD, expected_BD, rtol=FP64, atol=FP64)
    torch.testing.assert_close(module(tokens()), tokens() * expected_BD[:, None], rtol=FP64, atol=FP64)


def test_side_by_side_the_poolings_have_layers_of_their_own():
    module, found_BD = channel_weights(combine="concat")
    mean_BD, most_BD = tokens()[:, 2:].mean(1), tokens()[:, 2:].max(1).values
    of_mean, of_most = module.fc1.weight.chunk(2, dim=1)
    hidden_BK = (mean_BD @ of_mean.T + most_BD @ of_most.T + module.fc1.bias).clamp(min=0)
    expected_BD = (hidden_BK @ module.fc2.weight.T + module.fc2.bias).sigmoid()
    torch.testing.assert_close(found_BD, expected_BD, rtol=FP64, atol=FP64)


def test_softmax_weights_are_one_on_average_and_keep_the_order_of_the_scores():
    _, sigmoid_BD = channel_weights()
    _, softmax_BD = channel_weights(normalize="softmax")
    torch.testing.assert_close(softmax_BD.mean(1), torch.ones(2).double(), rtol=FP64, atol=FP64)
    scores_BD = sigmoid_BD.logit()
    ratio_BD = softmax_BD.log() - scores_BD  # the same for all features of a clip
    torch.testing.assert_close(ratio_BD, ratio_BD[:, :1].expand_as(ratio_BD), rtol=1e-9, atol=1e-9)


# ---- the network

VARIANTS = {
    "ast": [],
    "ast_cam": ["model.channel_attention.enabled=true"],
    "ast_3conf": ["model.conformer.blocks=3"],
    "ast_6conf_cam": ["model.conformer.blocks=6", "model.channel_attention.enabled=true"],
}
SMALL = ["data.frames=64", "model.depth=1"]


def test_without_blocks_and_weights_it_is_ast_and_has_no_parameter_more():
    config = tiny(*SMALL).model
    assert isinstance(config, AstConfig)
    assert not list(Ham(config).parameters())
    tokens_BSD = torch.randn(1, 62, 48)
    assert Ham(config)(tokens_BSD) is tokens_BSD


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_grid_has_its_shapes_and_a_gradient_everywhere(variant: str):
    classifier = network(*SMALL, *VARIANTS[variant]).train()
    logits_BC = classifier(patches_of(mels(64)))
    assert logits_BC.shape == (2, CLASSES)
    logits_BC.square().sum().backward()
    # The last bias of a key shifts all logits of a query alike, so what it gets is rounding; it is not left out here.
    without = [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("axis", ["time", "sequence"])
def test_one_batch_is_learned_by_heart(axis: str):
    variant = [*VARIANTS["ast_6conf_cam"], "model.conformer.blocks=2", f"model.conformer.axis={axis}"]
    classifier = network(*SMALL, *variant, "model.conformer.dropout=0").train()
    assert losses_of(classifier, patches_of(torch.randn(5, 64, 128)))[-1] < 0.1  # from log(5) = 1.6


@pytest.mark.parametrize("pooling", ["cls", "mean", "linear_softmax"])
def test_every_pooling_takes_what_the_conformer_makes(pooling: str):
    overrides = [*SMALL, f"objective.pooling={pooling}", "model.conformer.dropout=0"]
    with_blocks = network(*overrides, "model.conformer.blocks=1")
    without = network(*overrides)
    without.load_state_dict({k: v for k, v in with_blocks.state_dict().items() if not k.startswith("ham")})
    patches_BNP = patches_of(mels(64))
    assert with_blocks(patches_BNP).shape == without(patches_BNP).shape
    assert not torch.allclose(with_blocks(patches_BNP), without(patches_BNP))


def test_recomputed_conformer_blocks_draw_the_same_dropout():
    kept, again = network(*SMALL, *VARIANTS["ast_3conf"]), network(*SMALL, *VARIANTS["ast_3conf"])
    again.set_recompute(True)
    for classifier in (kept, again):
        torch.manual_seed(4)
        classifier.train()(patches_of(mels(64))).square().sum().backward()
    for (name, one), (_, other) in zip(kept.named_parameters(), again.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name


def test_parameters_and_arithmetic_are_the_closed_form():
    def costs(*overrides: str):
        config = tiny(*overrides)
        return network_costs(config.model, config.objective, FRAMES, CLASSES)

    plain, ham = costs(), costs(*VARIANTS["ast_3conf"])
    width, tokens_S, distances_L, kernel = 48, 242, 39, 31
    feed_forward = 2 * width + 2 * 4 * width**2 + 5 * width
    attention = 2 * width + 3 * width**2 + 3 * width + width**2 + 2 * width + width**2 + width
    convolution = 2 * width + 2 * width**2 + 2 * width + width * (kernel + 1) + 2 * width + width**2 + width
    assert ham.parameters["ham"] == 3 * (2 * feed_forward + attention + convolution + 2 * width)
    products = 2 * tokens_S * (16 + 4 + 3) * width**2 + 2 * 2 * tokens_S**2 * width
    of_distances = 2 * distances_L * width * tokens_S
    depthwise = 2 * tokens_S * width * kernel
    # A backward costs two forwards; of W r, whose sines have no gradient, one.
    block = 3 * (products + of_distances + depthwise) + 2 * 2 * distances_L * width**2
    assert sum(ham.flops.values()) - sum(plain.flops.values()) == 3 * block


def test_a_ham_starts_from_an_ast_and_its_own_parts_from_scratch(tmp_path: Path):
    trained, config = network(*SMALL), tiny(*SMALL)
    data = InputConfig(frames=64, log_mel=LogMelStats(mean=-4.0, std=4.0))
    labels = tuple(map(str, range(CLASSES)))
    description = Description(preset="ast", objective=config.objective, data=data, model=config.model, labels=labels)
    write_weights(tmp_path / "ast", description, {"model": trained.state_dict()})
    ham = tiny(*SMALL, *VARIANTS["ast_6conf_cam"], f"objective.init_from={tmp_path / 'ast'}")
    started = make_objective(ham, labels, torch.device("cpu")).module
    for name, tensor in trained.encoder.state_dict().items():
        assert torch.equal(started.encoder.state_dict()[name], tensor)
    assert len(started.ham.conformer.blocks) == 6


# ---- in the trainer


@pytest.mark.launch
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one_bit_for_bit(shards: Path, tmp_path: Path):
    """With dropout, dropped blocks and mixtures drawn, in a run that then tags and is evaluated like any other."""
    config = ROOT / "configs" / "spc2_ham.json"
    small = ["size=tiny", "model.width=48", "model.depth=1", "model.conformer.blocks=1", "data.frames=64"]
    steps = ["optimizer.steps=4", "optimizer.batch=8", "run.save_every=2", "run.eval_every=4", "run.log_every=1"]
    steps += ['optimizer.step_decay={"factor": 0.5, "every": 1, "start": 2}', "engine.precision=fp32", "run.keep=9"]
    data = [f"data.train={shards}:train", f"data.valid={shards}:test", "data.test=", "run.keep_best="]
    objective = ["objective.init_from=", "objective.drop_path=0.2", "objective.loss=ce"]
    run = [*small, *steps, *data, *objective, f"run.folder={tmp_path / 'run'}"]
    launch(0, "train.py", "--config", str(config), *run)
    last = tmp_path / "run" / "checkpoints" / "step-0000004"
    uninterrupted = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    shutil.rmtree(last)
    launch(0, "train.py", "--config", str(config), *run)
    for name, tensors in uninterrupted.items():
        continued = load_file(last / name)
        assert continued.keys() == tensors.keys()
        assert all(torch.equal(continued[key], tensor) for key, tensor in tensors.items()), name
    rates = [entry["lr"] for entry in read_metrics(tmp_path / "run", "train")]
    assert rates == [2.5e-4, 2.5e-4, 1.25e-4, 0.625e-4]
    (figures,) = read_metrics(tmp_path / "run", "valid")
    assert figures["clips"] == 16
    model = asda.load(tmp_path / "run")
    assert len(model.tags(torch.randn(16_000) / 10, 16_000, top=3)) == 3
    assert model.features(torch.randn(16_000) / 10, 16_000).patches.shape == (5 + 4, 12, 48)
