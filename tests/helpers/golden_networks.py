"""The networks against the official ones: pre-training, its trajectory, fine-tuning.

Shapes: B clips, M students of each, S = B * M sequences, N patches, K visible ones, D width, C channels of the decoder
or classes, T time patches, F mel patches, L masked patches of all students.
"""

from collections.abc import Callable, Iterator

import golden
import torch
from golden import Finetuning, Pretraining, Table
from golden_findings import EXACT_REL, UNIT_ROUNDING, Finding, Findings, figure, most, rms
from torch import Tensor, nn

from asda.config.model import EmaConfig
from asda.engine import ema as ema_module
from asda.errors import UserError
from asda.models import classifier, encoder, pretrain

# Of the golden README: what a correct fp32 implementation meets.
CLIP_TARGET_REL_RMS = 2e-5  # a mean that nearly cancels: its own fp64 floor is 9.4e-6, on another machine 1.2e-5
LOGIT_ABS = 5e-6  # the official fp32 logits are 1.1e-6 from their fp64 values
TRAJECTORY_REL = 1e-5
# A loss is the sum of thousands of squares, whose roundings average out: the official sums are within 1e-7 of fp64.
LOSS_REL = 1e-6
# A spread is a root of a mean of squares of differences: as the activations that it is made of.
SPREAD_REL = golden.REL_RMS
POOLINGS = {"cls": "CLS_TOKEN", "mean": "MEAN_POOLING", "linear_softmax": "LIN_SOFTMAX"}
Pair = tuple[nn.Parameter, Tensor]  # ours, official
LABELS = {"bce": "label.multi", "ce": "label.onehot"}


def local_tolerance(width: int) -> float:
    """For one norm and one product of `width` terms from official inputs: a random walk of roundings, there and here.

    `width` additions each round by 2^-24 / sqrt(3) rms of a sum that is at most the result; twice for two programs,
    and twice that for the norm. It stays well under the 4.5e-6 that an epsilon of 1e-6 in place of 1e-5 makes.
    """
    return 2 * (2 * width) ** 0.5 * UNIT_ROUNDING / 3**0.5


def check_pretrain(case: Pretraining) -> Findings:
    """Everything in the files of one pre-training."""
    yield from position_table(case)
    yield from student_forward(case)
    yield from teacher_forward(case)
    yield from norms_from_official_inputs(case)
    yield from gradients(case)
    yield from adam_step(case)
    yield from ema(case)


def position_table(case: Pretraining) -> Findings:
    """In units of what the official table's rounding allows.

    Its phases are fp32: the frequency and its product with the row are each rounded by up to 2^-24, so the phase, and
    with it the sine, is off by up to row x 2^-23; ours is computed in fp64. The sine and the cosine themselves add two
    roundings of 2^-24 at most.
    """
    official_ND = case.weights["modality_encoders.IMAGE.fixed_positional_encoder.positions"][0]
    num_mel_patches = case.model.mel_bins // case.model.patch
    ours_ND = encoder.sincos_positions(case.model.max_time_patches, num_mel_patches, case.model.width)
    row_N1 = torch.arange(len(ours_ND))[:, None] // num_mel_patches
    bound_N1 = row_N1.clamp(min=num_mel_patches - 1) * 2**-23 + 2**-23
    error = float(((ours_ND - official_ND).abs() / bound_N1).max())
    yield Finding("position table", "positions", error, 1.0, "of bound")


def record(part: encoder.Encoder) -> dict[str, Tensor]:
    """What a golden file records of an encoder's forward, filled while it runs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, args, output: seen.__setitem__(name, output)

    def keep_input(name: str) -> Callable:
        return lambda module, args: seen.__setitem__(name, args[0])

    part.patch_embed.register_forward_hook(keep("patch_embed"))
    part.norm.register_forward_pre_hook(keep_input("tokens_prenorm"))
    part.norm.register_forward_hook(keep("tokens"))
    for number, block in enumerate(part.blocks):
        if not isinstance(block.attn.norm, nn.Identity):  # EAT has none, and its file does not record its input
            block.attn.norm.register_forward_pre_hook(keep_input(f"block{number}.attn_heads"))
        block.attn.register_forward_hook(keep(f"block{number}.attn"))
        block.mlp.register_forward_hook(keep(f"block{number}.ffn"))
        block.norm2.register_forward_hook(keep(f"block{number}.out"))
    return seen


def student_forward(case: Pretraining) -> Findings:
    """One pass of all students: activations, decoder, losses."""
    students = case.students()
    seen = record(students.encoder)
    grids: list[Tensor] = []
    for layer in (*students.decoder.convs, students.decoder.proj):
        layer.register_forward_hook(lambda module, args, output: grids.append(args[0]))
    students.decoder.register_forward_hook(lambda module, args, output: seen.__setitem__("pred", output))
    with torch.no_grad():
        losses = case.losses(students)
        seen["patch_embed"] = students.encoder.patch_embed(case.patches)  # theirs embeds also what nobody sees
    yield from student_activations(case, seen)
    yield from decoder_grids(case, grids, seen["pred"].flatten(1, 2))
    yield from loss_terms(case, losses, seen)


def student_activations(case: Pretraining, seen: dict[str, Tensor]) -> Findings:
    """Theirs list the visible patches in a random order, ours in ascending order."""
    order_SK1 = case.official["fwd.mask.ids_keep"].argsort(1)[..., None]
    for name, ours in seen.items():
        if name == "pred":
            continue
        theirs = case.official[f"fwd.student.{name}"]
        if name != "patch_embed":
            kept = theirs[:, 1:].gather(1, order_SK1.expand(-1, -1, theirs.shape[-1]))
            theirs = torch.cat([theirs[:, :1], kept], dim=1)
        yield rms("student activations", name, ours, theirs)


def decoder_grids(case: Pretraining, grids: list[Tensor], pred_SND: Tensor) -> Findings:
    """The input of each layer and of the projection [S, C, T, F] or [S, T, F, C], and the output."""
    official, group = case.official, "decoder"
    width, num_mel_patches = case.config.decoder.width, case.model.mel_bins // case.model.patch
    x_SCTF = official["fwd.decoder.in"].unflatten(1, (-1, num_mel_patches)).movedim(-1, 1)
    yield rms(group, "in", grids[0], x_SCTF)
    for number, grid in enumerate(grids[1:]):
        conv_SCTF = official[f"fwd.decoder.block{number}.conv_out"]
        x_SCTF = conv_SCTF + x_SCTF if conv_SCTF.shape == x_SCTF.shape else conv_SCTF
        ours = grid if grid.shape[1] == width and number < len(grids) - 2 else grid.movedim(-1, 1)
        yield rms(group, f"after layer {number}", ours, x_SCTF)
    yield rms(group, "out", pred_SND, official["fwd.decoder.out"])
    yield rms(group, "pred_masked", pred_SND[case.masked], official["fwd.pred_masked"])


def loss_terms(case: Pretraining, losses: pretrain.Losses, seen: dict[str, Tensor]) -> Findings:
    """The terms of every element, and their sums.

    The official criterion sums, and its trainer divides by the number of masked patches; its utterance term is a sum
    over clips and students, ours a mean: the weight cls_loss x clips x students makes up for it.
    """
    official, expected, group = case.official, case.numbers["loss"], "losses"
    weight, num_masked = case.config.utterance_weight, expected["N_masked_sample_size"]
    pred_SND, cls_SD = seen["pred"].flatten(1, 2), seen[f"block{case.model.depth - 1}.out"][:, 0]
    targets_SND = official["fwd.targets.y"].repeat_interleave(case.config.students, dim=0)
    yield rms(group, "cls_pred", cls_SD, official["fwd.cls_pred"])
    frame_L = pretrain.scaled_error(pred_SND[case.masked], targets_SND[case.masked])
    yield rms(group, "regression_elem", frame_L, official["loss.regression_elem"].sum(-1))
    cls_S = pretrain.scaled_error(cls_SD, official["fwd.cls_target"]) * num_masked * weight / len(cls_SD)
    yield rms(group, "cls_elem", cls_S, official["loss.cls_elem"].sum(-1))
    yield figure(group, "loss", losses.total.item(), expected["loss_per_sample_size"], LOSS_REL)
    yield figure(group, "regression", losses.frame.item(), expected["regression_per_sample_size"], LOSS_REL)
    yield figure(group, "cls", weight * losses.utterance.item(), expected["cls_per_sample_size"], LOSS_REL)
    yield figure(group, "pred_var", losses.pred_var.item(), expected["pred_var"], SPREAD_REL)
    # Theirs is over the masked patches, ours over all: it then does not depend on the masks.
    y_LD = official["fwd.targets.y_masked"]
    spread = pretrain.feature_spread(y_LD, torch.ones(len(y_LD)))
    yield figure(group, "target_var", spread.item(), expected["target_var"], SPREAD_REL)


def teacher_forward(case: Pretraining) -> Findings:
    """One pass of the teacher over whole clips: activations, targets."""
    teacher, official = case.teacher(case.students()), case.official
    seen = record(teacher.encoder)
    targets = teacher.targets(case.patches)
    for name, ours in seen.items():
        yield rms("teacher activations", name, ours, official[f"fwd.teacher.{name}"])
    for number in range(case.model.depth):
        yield rms(
            "targets", f"layer{number}_in", seen[f"block{number}.ffn"][:, 1:], official[f"fwd.targets.layer{number}_in"]
        )
    yield rms("targets", "y", targets.tokens, official["fwd.targets.y"])
    y_SND = targets.tokens.repeat_interleave(case.config.students, dim=0)
    yield rms("targets", "y_masked", y_SND[case.masked], official["fwd.targets.y_masked"])
    cls_SD = targets.cls.repeat_interleave(case.config.students, dim=0)
    yield rms("targets", "cls", targets.cls, official["fwd.targets.cls"], CLIP_TARGET_REL_RMS)
    yield rms("targets", "cls_target", cls_SD, official["fwd.cls_target"], CLIP_TARGET_REL_RMS)


@torch.no_grad()
def norms_from_official_inputs(case: Pretraining) -> Findings:
    """Each norm fed with the official activations: through whole blocks an epsilon is too small a thing to be seen."""
    students = case.students()
    networks = {"student": students.encoder, "teacher": case.teacher(students).encoder}
    tolerance = local_tolerance(case.model.width)
    for who, network in networks.items():
        official = case.official.under(f"fwd.{who}.")
        stream = official["tokens"]
        yield rms("norms", f"{who} tokens", network.norm(official["tokens_prenorm"]), stream, tolerance)
        for number, block in enumerate(network.blocks):
            attention, ffn, out = (official[f"block{number}.{part}"] for part in ("attn", "ffn", "out"))
            if not isinstance(block.attn.norm, nn.Identity):
                normed = block.attn.norm(official[f"block{number}.attn_heads"]) * block.attn.scale
                yield rms("norms", f"{who} block{number}.attn", block.attn.proj(normed), attention, tolerance)
            ours = block.norm2(block.norm1(stream + attention) + ffn)
            yield rms("norms", f"{who} block{number}.out", ours, out, tolerance)
            stream = out


def gradients(case: Pretraining) -> Findings:
    """Every gradient of the summed loss, the norm of all, and the weights after one update by them."""
    students, settings = case.students(), case.numbers["adam_step"]
    case.losses(students).total.backward()
    num_masked = settings["grads_divided_by_sample_size"]
    official = golden.our_parameters(case.official, "grad.")
    yield from parameter_gradients("gradients", students, official, num_masked, "grad.")
    norm = update(students, with_official_eps(settings))
    yield figure("gradients", "grad_norm_before_clip", norm, settings["grad_norm_before_clip"], golden.REL_RMS)
    clipped = settings["clip_norm"] / max(settings["clip_norm"], settings["grad_norm_before_clip"]) / num_masked
    for name, (ours, theirs) in matching(students, golden.our_parameters(case.official, "adam_step."), "adam_step."):
        bound = adam_bound(official[name].double() * clipped, theirs, settings)
        error = float(((ours.detach().double() - theirs.double()).abs() / bound).max())
        yield Finding("Adam step by our gradients", name, error, 1.0, "of bound")


def parameter_gradients(
    group: str, module: nn.Module, official: dict[str, Tensor], scale: float, prefix: str
) -> Findings:
    """The gradient of every parameter times `scale`; that of the keys' biases is 0, so there rounding is compared.

    It is the sum of the terms that, times the layer's inputs, add up to the gradient of the keys' weights: the noise of
    the one may be as large relative to the rms of the other as the error of any gradient.
    """
    for name, (parameter, theirs) in matching(module, official, prefix):
        assert parameter.grad is not None
        ours = parameter.grad * scale
        yield rms(group, name, *(golden.without_key_biases(name, gradient) for gradient in (ours, theirs)))
        if name.endswith("qk.bias"):
            noise, terms = ours.chunk(2)[1], official[name.replace("bias", "weight")].chunk(2)[1]
            error = noise.square().mean().sqrt() / terms.square().mean().sqrt()
            yield Finding(group, f"{name} of keys", float(error), golden.REL_RMS, "of weights")


def adam_bound(gradient: Tensor, weight: Tensor, settings: Table) -> Tensor:
    """How far each weight may be from the official one after the first update, given how far its gradient may be.

    That update moves a weight by lr f(g), f(g) = g / (|g| + eps), which only grows with g: if no element of the
    gradient is off by more than d, the movement is off by at most lr (f(g + d) - f(g - d)); that is next to nothing
    where |g| > d, and 2 lr at most. d is five times the rms that the gradients are allowed. In either program the
    weight rounds twice, by decay and by movement, and the movement about eight times on its own way.
    """
    d, eps = 5 * golden.REL_RMS * gradient.square().mean().sqrt(), with_official_eps(settings)["eps"]
    low, high = (g / (g.abs() + eps) for g in (gradient - d, gradient + d))
    rounding = 2 * UNIT_ROUNDING * (2 * (weight.double().abs() + settings["lr"]) + 8 * settings["lr"])
    return settings["lr"] * (high - low) + rounding


def with_official_eps(settings: Table) -> Table:
    """Settings whose eps makes the first update of torch's Adam fairseq's.

    fairseq adds eps to the root of the second moment before that is corrected for its start from 0, torch after it. In
    the first update the correction is 1 - beta2; after a hundred it is 1, and both are the same.
    """
    eps = settings["eps"] / (1 - settings["betas"][1]) ** 0.5
    return Table(settings | {"eps": eps}, settings.source)


def adam_step(case: Pretraining) -> Findings:
    """One update by the official gradients and with the official eps, and the teacher after it.

    Every weight rounds twice in either program, by the decay and by the movement; the movement, of a hundredth of the
    weight, rounds about ten times more.
    """
    students, settings = case.students(), case.numbers["adam_step"]
    for _, (ours, theirs) in matching(students, golden.our_parameters(case.official, "grad."), "grad."):
        ours.grad = theirs / settings["grads_divided_by_sample_size"]
    update(students, with_official_eps(settings))
    for name, (ours, theirs) in matching(students, golden.our_parameters(case.official, "adam_step."), "adam_step."):
        yield rms("Adam step", name, ours, theirs, 5 * UNIT_ROUNDING)
    if case.official.under("adam_step_ema."):  # not every file has them
        teacher = case.teacher(case.students())
        ema_module.ema_update(
            teacher.encoder.parameters(), students.encoder.parameters(), case.numbers["ema"]["decay_plain"]
        )
        yield from teacher_weights(case, teacher, "adam_step_ema.")


def update(students: pretrain.MaskedStudents, settings: Table) -> float:
    """Clip the gradients and take one step of Adam; the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(students.parameters(), settings["clip_norm"])
    adam(students, settings).step()
    return norm.item()


def adam(students: pretrain.MaskedStudents, settings: Table) -> torch.optim.AdamW:
    """The optimizer of asda/engine/zero.py with the official settings: decay reaches biases and norms too."""
    return torch.optim.AdamW(
        students.parameters(),
        lr=settings.get("lr", 0.0),
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


def ema(case: Pretraining) -> Findings:
    """The decay as a function of the number of updates, and the teacher after a step of it."""
    numbers, students = case.numbers["ema"], case.students()
    cfg = case.numbers["model_cfg"]
    config = EmaConfig(decay=cfg["ema_decay"], end_decay=cfg["ema_end_decay"], anneal_steps=cfg["ema_anneal_end_step"])
    for updates, decay in numbers["annealed_decay_by_num_updates"].items():
        ours = ema_module.ema_decay(config, int(updates))
        yield figure("EMA decay", f"after {updates} updates", ours, decay, EXACT_REL)
    for prefix, decay in (
        ("ema_step.", numbers["decay_plain"]),
        ("ema_first_update.", ema_module.ema_decay(config, 1)),
    ):
        if prefix == "ema_first_update." and not case.official.under(prefix):
            continue  # not every file has them
        teacher = case.teacher(students)
        ema_module.ema_update(teacher.encoder.parameters(), students.encoder.parameters(), decay)
        yield from teacher_weights(case, teacher, prefix)


def teacher_weights(case: Pretraining, teacher: pretrain.Teacher, prefix: str) -> Findings:
    """The weights after a step, which moves them by a ten-thousandth: far less than 1e-5 of them must be wrong.

    An fp32 weight is rounded once in our fused step, and twice where two products are added.
    """
    for name, (ours, theirs) in matching(teacher.encoder, golden.encoder_parameters(case.official, prefix), prefix):
        yield rms("EMA step", prefix + name, ours, theirs, 3 * UNIT_ROUNDING)


def matching(
    module: nn.Module, official: dict[str, Tensor], prefix: str
) -> Iterator[tuple[str, tuple[nn.Parameter, Tensor]]]:
    """Each parameter of `module` with the official tensor of its name; neither side may have more."""
    ours = dict(module.named_parameters())
    if ours.keys() != official.keys():
        name = sorted(ours.keys() ^ official.keys())[0]
        has, has_not = ("ours", "the golden file") if name in ours else ("the golden file", "ours")
        raise UserError(f"{prefix}{name} is in {has} and not in {has_not}; write the file again")
    for name, parameter in ours.items():
        yield name, (parameter, official[name])


def check_trajectory(case: Pretraining, official: Table, numbers: Table) -> Findings:
    """Full updates from the pre-training checkpoint: loss terms and norms of each, weights after the last."""
    students = case.students()
    teacher, optimizer = case.teacher(students), adam(students, numbers["adam"])
    anneal = numbers["ema"]
    config = EmaConfig(decay=anneal["decay"], end_decay=anneal["end"], anneal_steps=anneal["anneal_end_step"])
    for number, update in enumerate(numbers["updates"]):
        patches_BNP, mask_SN = golden.patchify(official[f"source.{number}"]), official[f"mask.{number}"]
        targets = teacher.targets(patches_BNP)
        silence = torch.zeros(*mask_SN.shape, case.model.width)
        losses = students(patches_BNP, case.visible_of(mask_SN), targets.tokens, targets.cls, silence)
        optimizer.zero_grad()
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(students.parameters(), numbers["clip_norm"])
        optimizer.param_groups[0]["lr"] = update["lr"]
        optimizer.step()
        decay = ema_module.ema_decay(config, number + 1)
        ema_module.ema_update(teacher.encoder.parameters(), students.encoder.parameters(), decay)
        masked_LD = targets.tokens.repeat_interleave(case.config.students, dim=0)[mask_SN.bool()]
        figures = {
            "loss": losses.total,
            "loss_regression": losses.frame,
            "loss_cls": case.config.utterance_weight * losses.utterance,
            "pred_var": losses.pred_var,
            "target_var": pretrain.feature_spread(masked_LD, torch.ones(len(masked_LD))),
            "grad_norm": norm,
            "ema_decay_after": torch.tensor(decay, dtype=torch.float64),
        }
        for name, ours in figures.items():
            yield figure("losses", f"update {number}: {name}", ours.item(), update[name], TRAJECTORY_REL)
    # Where a gradient is smaller than its rounding noise, 1e-5 of the gradients' rms, Adam's step is noise of the size
    # of the learning rate; about 1e-5 of all elements are that small, and sqrt(1e-5) of the summed rates is their rms.
    tolerance = 1e-5**0.5 * sum(update["lr"] for update in numbers["updates"])
    students_final = golden.our_parameters(official, "final.")
    teacher_final = golden.encoder_parameters(official, "final_ema.")
    for prefix, module, final in (("final.", students, students_final), ("final_ema.", teacher.encoder, teacher_final)):
        for name, (ours, theirs) in matching(module, final, prefix):
            error = golden.without_key_biases(name, ours.detach() - theirs).square().mean().sqrt()
            yield Finding("weights", prefix + name, float(error), tolerance, "rms")


def check_finetune(case: Finetuning) -> Findings:
    """Everything in the files of one fine-tuning."""
    for frames in case.numbers["spec"]["ft_lengths"]:
        yield from logits(case, frames)
        yield from finetune_activations(case, frames)
    for loss in LABELS:
        yield from classification(case, loss)
    yield from recipe(case)


@torch.no_grad()
def logits(case: Finetuning, frames: int) -> Findings:
    """Of clips of this many frames, by each pooling."""
    patches_BNP = golden.patchify(case.official[f"input.T{frames}"])
    for pooling, theirs in POOLINGS.items():
        ours_BC = case.classifier(pooling=pooling)(patches_BNP)
        name = f"T{frames}.logits.{theirs}"
        yield most(f"logits {theirs}", name, ours_BC, case.official[f"eval.{name}"], LOGIT_ABS)


@torch.no_grad()
def finetune_activations(case: Finetuning, frames: int) -> Findings:
    """Of whole clips in evaluation mode; the norm before the head once more from the official tokens."""
    ours, official, prefix = case.classifier(), case.official, f"T{frames}."
    seen = record(ours.encoder)
    seen["features_with_cls"] = ours.encoder(golden.patchify(official[f"input.T{frames}"]))
    seen["cls_normed"] = ours.norm(seen["features_with_cls"][:, 0])
    for name, tensor in seen.items():
        if f"eval.{prefix}{name}" in official or name in ("features_with_cls", "cls_normed"):
            yield rms("activations", prefix + name, tensor, official[f"eval.{prefix}{name}"])
    normed_BD = ours.norm(official[f"eval.{prefix}features_with_cls"][:, 0])
    tolerance = local_tolerance(case.model.width)
    yield rms("norms", f"{prefix}cls_normed", normed_BD, official[f"eval.{prefix}cls_normed"], tolerance)


def classification(case: Finetuning, loss: str) -> Findings:
    """The loss of each clip, the official sum of them, and its gradients."""
    config, official = golden.classify_config(loss=loss), case.official
    ours, targets_BC = case.classifier(), official[LABELS[loss]]
    group, expected = f"{loss} loss and gradients", case.numbers[f"train_{loss}"]["criterion_loss_sum"]
    logits_BC = ours(golden.patchify(official[f"input.T{case.numbers['spec']['target_length']}"]))
    if loss == "bce":
        yield most(
            group, "predictions_sigmoid", logits_BC.sigmoid(), official["eval.bce.predictions_sigmoid"], LOGIT_ABS
        )
    elements = official[f"train.{loss}.loss_elem"]  # [B, C] or [B]
    per_clip = [
        classifier.classification_loss(logits_1C, targets_1C, config)
        for logits_1C, targets_1C in zip(logits_BC.split(1), targets_BC.split(1), strict=True)
    ]
    yield rms(group, "loss_elem", torch.stack(per_clip), elements.reshape(len(per_clip), -1).sum(1))
    summed = classifier.classification_loss(logits_BC, targets_BC, config) * len(logits_BC)
    yield figure(group, "criterion_loss_sum", summed.item(), expected, LOSS_REL)
    summed.backward()
    prefix = f"train.{loss}.grad."
    yield from parameter_gradients(group, ours, golden.our_parameters(official, prefix), 1, prefix)


def recipe(case: Finetuning) -> Findings:
    """The learning-rate scale of every parameter, and the rate of drop path in every block."""
    overrides, rates = case.numbers["optim_overrides"], case.numbers["drop_path_per_block"]
    # As tensors of the parameters' shapes they pass through the same renaming.
    scales = {
        name: torch.full_like(case.weights[name], _lr_scale(overrides[name]), dtype=torch.float64) for name in overrides
    }
    theirs = {name: float(tensor.flatten()[0]) for name, tensor in golden.our_parameters(scales).items()}
    ours = case.classifier(drop_path=rates[-1])
    layer_decay = theirs[f"encoder.blocks.{case.model.depth - 1}.mlp.fc1.weight"]  # of the last block: decay ** 1
    for name, scale in classifier.lr_scales(ours, layer_decay).items():
        yield figure("lr scales", name, scale, theirs.get(name, 1.0), EXACT_REL)
    for number, (block, rate) in enumerate(zip(ours.encoder.blocks, rates, strict=True)):
        yield figure("drop path", f"block {number}", block.drop_path.rate, rate, EXACT_REL)


def _lr_scale(override: Table | None) -> float:
    return (override or {}).get("optimizer", {}).get("lr_scale", 1.0)
