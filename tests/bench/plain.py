"""The published formulations in eager PyTorch, one loop after the other as the papers' programs run them.

    plain.py prune   --method wanda|sparsegpt|magnitude --model DIR --tokens F.h5 [options]
    plain.py solves  --shapes NAME:ROWSxINPUTS:STATISTIC ... [options]
    plain.py train   --model DIR --tokens F.h5 --steps N [options]

prints one line of JSON: seconds (or tokens_per_second, a value a step) and peak_resident_bytes. Reading the
model and writing the result count neither in the seconds nor in the peak, which favours this side. It is the
other side of run.py.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as functional
import torch.utils.checkpoint
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak_resident_bytes():
    """VmHWM of this process: getrusage would also count the process that started it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def load_model(directory, dtype):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts anew: reading holds the weights twice
    return model


def draw_windows(file, count, length):
    """`count` random windows of `length` tokens: int64 [count, length]."""
    import h5py

    with h5py.File(file) as data:
        tokens = torch.from_numpy(data["tokens"][:]).long()
    starts = torch.randint(0, len(tokens) - length, (count,), generator=torch.Generator().manual_seed(0))
    return torch.stack([tokens[start:start + length] for start in starts.tolist()])


def read_pattern(text):
    """(kept, group) of "K:M"; None when unstructured."""
    return None if text == "unstructured" else tuple(int(part) for part in text.split(":"))


# ------------------------------------------------------------------------------------------- pruning


class MagnitudeStatistic:
    """None: the weights decide alone."""

    def __init__(self, layer):
        self.layer = layer

    def add(self, inputs):
        pass

    def prune(self, pattern, sparsity):
        weight = self.layer.weight.data
        score = weight.abs()
        if pattern is None:
            threshold = score.flatten().sort().values[int(weight.numel() * sparsity)]
            mask = score <= threshold
        else:
            mask = lowest_of_groups(score, pattern)
        weight[mask] = 0


class WandaStatistic:
    """Mean over sequences of the inputs' squared norms (arXiv 2306.11695)."""

    def __init__(self, layer):
        self.layer = layer
        self.mean = torch.zeros(layer.in_features)
        self.sequences = 0

    def add(self, inputs):
        inputs = inputs.reshape(-1, inputs.shape[-1]).t().to(torch.float32)
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.mean += inputs.norm(p=2, dim=1) ** 2 / self.sequences

    def prune(self, pattern, sparsity):
        weight = self.layer.weight.data
        score = weight.abs() * self.mean.sqrt()[None]
        if pattern is None:
            order = score.sort(dim=-1, stable=True).indices
            mask = torch.zeros_like(score, dtype=torch.bool)
            mask.scatter_(1, order[:, :int(weight.shape[1] * sparsity)], True)
        else:
            mask = lowest_of_groups(score, pattern)
        weight[mask] = 0


def lowest_of_groups(score, pattern):
    """True at the M-K smallest of every M consecutive columns, group by group."""
    kept, group = pattern
    mask = torch.zeros_like(score, dtype=torch.bool)
    for first in range(0, score.shape[1], group):
        lowest = score[:, first:first + group].float().topk(group - kept, dim=1, largest=False).indices
        mask.scatter_(1, first + lowest, True)
    return mask


class SparsegptStatistic:
    """H = 2/N sum X^T X, a Gram for every matrix (arXiv 2301.00774)."""

    def __init__(self, layer):
        self.layer = layer
        self.hessian = torch.zeros(layer.in_features, layer.in_features)
        self.sequences = 0

    def add(self, inputs):
        inputs = inputs.reshape(-1, inputs.shape[-1]).t()
        self.hessian *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        inputs = (2 / self.sequences) ** 0.5 * inputs.float()
        self.hessian += inputs.matmul(inputs.t())

    def prune(self, pattern, sparsity):
        weight = self.layer.weight.data
        solved = solve_sparsegpt(weight.clone().float(), self.hessian, pattern, sparsity)
        self.layer.weight.data = solved.to(weight.dtype)


def solve_sparsegpt(weight, hessian, pattern, sparsity, block=128, damping=0.01):
    """Algorithm 1: weight float32 [rows, inputs] pruned and corrected; hessian [inputs, inputs] is consumed."""
    rows, columns = weight.shape
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    diagonal = torch.arange(columns)
    hessian[diagonal, diagonal] += damping * torch.diag(hessian).mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part = weight[:, first:last].clone()
        solved, errors = torch.zeros_like(part), torch.zeros_like(part)
        inner = factor[first:last, first:last]
        if pattern is None:
            score = part ** 2 / torch.diag(inner).reshape(1, -1) ** 2
            mask = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        else:
            mask = torch.zeros_like(part, dtype=torch.bool)
        for i in range(last - first):
            if pattern is not None and i % pattern[1] == 0:
                kept, group = pattern
                score = part[:, i:i + group] ** 2 / torch.diag(inner)[i:i + group].reshape(1, -1) ** 2
                mask.scatter_(1, i + score.topk(group - kept, dim=1, largest=False).indices, True)
            column = part[:, i]
            new = column.clone()
            new[mask[:, i]] = 0
            solved[:, i] = new
            error = (column - new) / inner[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, first:last] = solved
        weight[:, last:] -= errors.matmul(factor[first:last, last:])
    return weight


STATISTICS = {"magnitude": MagnitudeStatistic, "wanda": WandaStatistic, "sparsegpt": SparsegptStatistic}


@torch.no_grad()
def prune_layerwise(model, windows, method, pattern, sparsity, blocks):
    """Block by block: one pass with hooks, the pruning, one pass through the pruned block. Sequence by sequence."""
    decoder = model.model
    inputs = torch.stack([decoder.embed_tokens(window) for window in windows])
    outputs = torch.zeros_like(inputs)
    rotary = decoder.rotary_emb(inputs[:1], torch.arange(windows.shape[1])[None])
    for block in decoder.layers[:blocks]:
        statistics = {name: STATISTICS[method](layer) for name, layer in block.named_modules()
                      if isinstance(layer, nn.Linear)}
        hooks = [statistic.layer.register_forward_hook(lambda _, taken, __, statistic=statistic: statistic.add(taken[0]))
                 for statistic in statistics.values()]
        for i in range(len(windows)):
            outputs[i] = block(inputs[i][None], position_embeddings=rotary)[0]
        for hook in hooks:
            hook.remove()
        for statistic in statistics.values():
            statistic.prune(pattern, sparsity)
        for i in range(len(windows)):
            outputs[i] = block(inputs[i][None], position_embeddings=rotary)[0]
        inputs, outputs = outputs, inputs


def run_prune(options):
    model = load_model(options.model, options.dtype).eval()
    windows = draw_windows(options.tokens, options.samples, options.length)
    begin = time.perf_counter()
    prune_layerwise(model, windows, options.method, read_pattern(options.pattern), options.sparsity, options.blocks)
    seconds = time.perf_counter() - begin
    weights = [layer.weight for layer in model.model.layers[0].modules() if isinstance(layer, nn.Linear)]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    return {"seconds": seconds, "zeros": zeros}


@torch.no_grad()
def run_solves(options):
    """The solves of one block, each with a Hessian and a factorisation of its own, as published."""
    generator = torch.Generator().manual_seed(0)
    problems = []
    for shape in options.shapes:
        rows, inputs = (int(part) for part in shape.split(":")[1].split("x"))
        tokens = torch.randn(2 * inputs, inputs, generator=generator)
        tokens += 0.5 * tokens.roll(1, 1)
        problems.append((torch.randn(rows, inputs, generator=generator), tokens.t().matmul(tokens)))
    seconds = []
    for _ in range(options.repetitions + 1):  # the first warms up
        fresh = [(weight.clone(), hessian.clone()) for weight, hessian in problems]
        begin = time.perf_counter()
        for weight, hessian in fresh:
            solve_sparsegpt(weight, hessian, read_pattern(options.pattern), options.sparsity)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds[1:]}


# ---------------------------------------------------------------------------------------- retraining


class SppLinear(nn.Module):
    """y = x W^T + s x (W * repeat(alpha) * beta)^T (arXiv 2405.16057, eq. 4-7): two products.

    recompute="added" checkpoints the added product, so that the scaled weights live only while they are
    used; "block" leaves that to the block around it.
    """

    def __init__(self, layer, groups, scale, recompute):
        super().__init__()
        rows, inputs = layer.weight.shape
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        self.alpha = nn.Parameter(torch.empty(groups, inputs).uniform_(-inputs ** -0.5, inputs ** -0.5))
        self.beta = nn.Parameter(torch.zeros(rows))
        self.scale, self.recompute = scale, recompute

    def added(self, x):
        alpha, beta = self.alpha.to(self.weight.dtype), self.beta.to(self.weight.dtype)
        groups = self.weight.view(alpha.shape[0], -1, alpha.shape[1])
        return functional.linear(x, (groups * alpha[:, None]).view_as(self.weight) * beta[:, None])

    def forward(self, x):
        if self.recompute == "added":
            added = torch.utils.checkpoint.checkpoint(self.added, x, use_reentrant=False)
        else:
            added = self.added(x)
        return functional.linear(x, self.weight) + self.scale * added


def add_adapters(model, groups, scale, recompute):
    for parameter in model.parameters():
        parameter.requires_grad = False
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, SppLinear(layer, groups, scale, recompute))
    if recompute == "block":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run_train(options):
    torch.manual_seed(0)
    model = load_model(options.model, options.dtype).train()
    model.config.use_cache = False
    parameters = add_adapters(model, options.groups, options.scale, options.recompute)
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.001)
    windows = draw_windows(options.tokens, options.batch * options.steps, options.length)
    speeds, losses = [], []
    for step in range(options.steps):
        begin = time.perf_counter()
        batch = windows[step * options.batch:(step + 1) * options.batch]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(batch.numel() / (time.perf_counter() - begin))
        losses.append(loss.item())
    return {"tokens_per_second": speeds, "losses": losses}


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prune, solves, train = (commands.add_parser(name) for name in ("prune", "solves", "train"))
    for command in (prune, solves, train):
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--pattern", default="2:4")
        command.add_argument("--sparsity", type=float, default=0.5)
    for command in (prune, train):
        command.add_argument("--model", required=True)
        command.add_argument("--tokens", required=True)
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        command.add_argument("--length", type=int, default=512)
    prune.add_argument("--method", choices=STATISTICS, default="wanda")
    prune.add_argument("--samples", type=int, default=128)
    prune.add_argument("--blocks", type=int, default=None, help="stop after so many blocks")
    solves.add_argument("--shapes", nargs="+", required=True)
    solves.add_argument("--repetitions", type=int, default=1)
    train.add_argument("--steps", type=int, default=4)
    train.add_argument("--batch", type=int, default=4)
    train.add_argument("--groups", type=int, default=16)
    train.add_argument("--scale", type=float, default=2.0)
    train.add_argument("--recompute", choices=["added", "block", "nothing"], default="added")
    return parser.parse_args()


def main():
    options = read_options()
    torch.set_num_threads(options.threads)
    result = {"prune": run_prune, "solves": run_solves, "train": run_train}[options.command](options)
    result["peak_resident_bytes"] = peak_resident_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
