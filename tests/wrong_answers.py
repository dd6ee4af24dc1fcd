"""Answers to the assignments' exercises that are wrong, and others that are right, though not ours.

`WRONG`: exercise -> (what is wrong, a piece of the solution, what a student wrote instead): the six
typical mistakes wherever an exercise has room for them, and some of its own. The public check
refuses each; `SUBTLE` are those that only the hidden tests refuse. `RIGHT`: exercise -> (how, code):
loops, chunks, NumPy, in place where the text allows it. All tests accept each.
"""

from textwrap import dedent

WRONG = {
    "A1-1": [
        ("off by one in the range", "steps = 2**bits - 1", "steps = 2**bits"),
        ("missing clamp", "lo, hi = min(lo, 0.0), max(hi, 0.0)", "pass"),
        ("biased rounding", "round(lo / scale)", "math.floor(lo / scale)"),
        ("biased rounding: cut off", "round(lo / scale)", "int(lo / scale)"),
        ("wrong normalisation", "2 * max(-lo, hi) / steps", "max(-lo, hi) / steps"),
        ("wrong side", "smallest - round", "smallest + round"),
        ("no smallest scale", "max((hi - lo) / steps, EPS)", "(hi - lo) / steps + 1e-12"),
        ("half up", "round(lo / scale)", "math.floor(lo / scale + 0.5)"),
        (
            "half away from zero",
            "round(lo / scale)",
            "int(math.copysign(math.floor(abs(lo / scale) + 0.5), lo))",
        ),
        ("a floor for zero only", "max((hi - lo) / steps, EPS)", "((hi - lo) / steps or EPS)"),
        (
            "a floor for zero only: symmetric",
            "max(2 * max(-lo, hi) / steps, EPS)",
            "(2 * max(-lo, hi) / steps or EPS)",
        ),
        (
            "PyTorch's symmetric scale",
            "2 * max(-lo, hi) / steps",
            "max(-lo, hi) / (2 ** (bits - 1) - 1)",
        ),
        (
            "a list",
            "return scale, smallest - round(lo / scale)",
            "return [scale, smallest - round(lo / scale)]",
        ),
        ("unsigned zero point", "0 if signed else 2 ** (bits - 1)", "0"),
        (
            "the range that was given",
            "lo, hi = min(lo, 0.0), max(hi, 0.0)",
            "lo, hi = min(lo, hi), max(lo, hi)",
        ),
    ],
    "A1-2": [
        ("off by one in the range", "smallest, largest)\n", "smallest, largest + 1)\n"),
        ("missing clamp", ", smallest, largest)\n", ", -1000, 1000)\n"),
        ("biased rounding", "torch.round(x / scale)", "torch.floor(x / scale)"),
        ("biased rounding: half up", "torch.round(x / scale)", "torch.floor(x / scale + 0.5)"),
        (
            "clamp before the zero point",
            "torch.clamp(torch.round(x / scale) + zero_point, smallest, largest)",
            "torch.clamp(torch.round(x / scale), smallest, largest) + zero_point",
        ),
        ("zero point forgotten", "(q - zero_point) * scale", "q * scale"),
        ("argument changed", "q = torch", "x *= 1.5\n    q = torch"),
        (
            "its argument comes back",
            "return (q - zero_point) * scale",
            "return x.copy_((q - zero_point) * scale)",
        ),
        (
            "nothing new when nothing changes",
            "return (q - zero_point) * scale",
            "y = (q - zero_point) * scale\n    return x if torch.equal(x, y) else y",
        ),
        ("nothing done", "return (q - zero_point) * scale", "return x"),
        (
            "zero point before rounding",
            "torch.round(x / scale) + zero_point",
            "torch.round(x / scale + zero_point)",
        ),
        ("integers come back", "return (q - zero_point) * scale", "return q"),
        ("multiplied first", "torch.round(x / scale)", "torch.round(x * scale)"),
    ],
    "A1-3": [
        ("off by one in the range", "2 ** (bits - 1) - 1\n", "2 ** (bits - 1)\n"),
        ("wrong axis", "x.movedim(axis, 0)", "x.movedim(axis - 1, 0)"),
        ("missing clamp", ".clamp(-largest - 1, largest)", ""),
        ("biased rounding", "torch.round(x", "torch.trunc(x"),
        ("wrong normalisation", "2 * rows.abs()", "rows.abs()"),
        ("largest instead of magnitude", "rows.abs().amax(1)", "rows.amax(1)"),
        ("floats", "q.to(torch.int8)", "q"),
        ("no floor of the scale", ".clamp(min=EPS)", ""),
        (
            "a floor for zero only",
            ".clamp(min=EPS)",
            ".add(0).where(rows.abs().amax(1) > 0, torch.tensor(EPS))",
        ),
        (
            "half away from zero",
            "torch.round(x / scales.view(shape))",
            "torch.sign(x) * torch.floor((x / scales.view(shape)).abs() + 0.5)",
        ),
        (
            "half up",
            "torch.round(x / scales.view(shape))",
            "torch.floor(x / scales.view(shape) + 0.5)",
        ),
        ("one scale for all", "rows.abs().amax(1)", "rows.abs().amax().expand(len(rows))"),
        (
            "scales keep their axes",
            "return q.to(torch.int8), scales",
            "return q.to(torch.int8), scales.view(shape)",
        ),
        ("symmetric integers", "-largest - 1, largest", "-largest, largest"),
    ],
    "A1-4": [
        ("off by one in the range", "range(81)", "range(80)"),
        ("the last batch only", "torch.cat(self.seen)", "self.seen[-1]"),
        (
            "wrong normalisation: batches weigh alike",
            "float(((eq.fake_quantize(values, *params, self.integers) - values) ** 2).mean())",
            "sum(float(((eq.fake_quantize(v, *params, self.integers) - v) ** 2).mean()) "
            "for v in self.seen)",
        ),
        ("one end only", "lo * share, hi * share", "lo, hi * share"),
        ("no clipping at all", "if error < least", "if best is None"),
        ("no error without data", 'raise ValueError("no data was seen")', "return 1.0, 0"),
        (
            "forgets what it saw",
            "values = torch.cat(self.seen)",
            "values = torch.cat(self.seen)\n        self.seen = []",
        ),
        (
            "answers once",
            "values = torch.cat(self.seen)",
            "values = self.seen[0] if self.share else torch.cat(self.seen)",
        ),
        (
            "the share is not stored",
            "least, best, self.share = error, params, share",
            "least, best = error, params",
        ),
        ("the smaller share among equals", "if error < least", "if error <= least"),
        ("symmetric", "symmetric=False", "symmetric=True"),
    ],
    "A1-5": [
        ("off by one in the range", "range(2, 9)", "range(2, 8)"),
        ("off by one at the start", "range(2, 9)", "range(3, 9)"),
        ("wrong normalisation", "10 * torch.log10", "20 * torch.log10"),
        ("mean magnitude", "(x**2).sum() / (noise**2).sum()", "x.abs().sum() / noise.abs().sum()"),
        ("natural logarithm", "torch.log10", "torch.log"),
        ("8 instead of None", "return None", "return 8"),
        ("more than instead of at least", ">= decibels", "> decibels"),
        ("variance", "(x**2).sum() / (noise**2).sum()", "x.var() / noise.var()"),
        ("from the top", "range(2, 9)", "range(8, 1, -1)"),
        ("asymmetric", "symmetric=True", "symmetric=False"),
        ("a float", "return bits\n    return None", "return float(bits)\n    return None"),
    ],
    "A2-1": [
        ("wrong normalisation", "noise * center.abs() if", "noise / noise.norm() * center if"),
        ("wrong normalisation: unit length", "else noise", "else noise / noise.norm()"),
        (
            "the global random state",
            "torch.randn(len(center), generator=generator)",
            "(torch.manual_seed(seed), torch.randn(len(center)))[1]",
        ),
        ("uniform", "torch.randn(", "torch.rand("),
        ("missing clamp", "radii[:, None] * direction).abs()", "radii[:, None] * direction)"),
        ("set to zero", "direction).abs()", "direction).clamp(min=0)"),
        (
            "wrong axis",
            "(center + radii[:, None] * direction).abs()",
            "(center + radii[:, None] * direction).abs().T",
        ),
        ("sign kept", "noise * center.abs() if", "noise * center if"),
        (
            "magnitude of the step only",
            "(center + radii[:, None] * direction).abs()",
            "center + (radii[:, None] * direction).abs()",
        ),
        (
            "one generator for all",
            "torch.Generator().manual_seed(seed)",
            "torch.Generator().manual_seed(0)",
        ),
        (
            "half of it",
            "torch.randn(len(center), generator=generator)",
            "torch.randn(len(center), generator=generator) / 2",
        ),
    ],
    "A2-2": [
        ("wrong normalisation", "/ span if span > 0", "/ len(values) if span > 0"),
        ("no magnitude", "values.diff().abs()", "values.diff()"),
        ("maxima", "-values.numpy()", "values.numpy()"),
        ("no floor", "> floor", "> 0"),
        ("off by one", "> floor).sum())", "> floor).sum()) + 1"),
        ("at least instead of more than", "> floor", ">= floor"),
        ("flat valleys count", ", plateau_size=(None, 1)", ""),
        (
            "the depth to one neighbor",
            "peak_prominences(hills, tops)[0]",
            "(hills[tops] - hills[tops - 1])",
        ),
        ("a number that is no integer", "int((peak", "float((peak"),
        ("a constant", " if span > 0 else 0.0", " if span > 0 else 1.0"),
    ],
    "A2-3": [
        ("wrong axis", "(values.amax(0) - values.amin(0))", "(values.amax(1) - values.amin(1))"),
        ("mean instead of largest", ".max())", ".mean())"),
        ("the first two only", "for kernel in kernels", "for kernel in kernels[:2]"),
        ("sign", "(values.amax(0) - values.amin(0))", "(values[1] - values[0])"),
        ("standard deviation", "(values.amax(0) - values.amin(0))", "values.std(0)"),
        ("half of it", "(values.amax(0) - values.amin(0))", "(values.amax(0) - values.mean(0))"),
        ("the first point only", ".max())", "[0])"),
        (
            "the spread over points",
            "(values.amax(0) - values.amin(0)).max()",
            "values.max() - values.min()",
        ),
        (
            "neighbors in the list",
            "(values.amax(0) - values.amin(0)).max()",
            "values.diff(dim=0).abs().max() if len(values) > 1 else 0.0",
        ),
    ],
    "A2-4": [
        (
            "missing clamp",
            "torch.clamp(round_straight(x / s), smallest, largest)",
            "round_straight(x / s)",
        ),
        ("off by one in the range", "smallest, largest)\n", "smallest, largest + 1)\n"),
        ("biased rounding", "(torch.round(x) - x)", "(torch.floor(x + 0.5) - x)"),
        ("no gradient", "x + (torch.round(x) - x).detach()", "x * 0 + torch.round(x)"),
        ("wrong normalisation", "** 2).mean()", "** 2).sum()"),
        ("integers kept fixed", "round_straight(x / s)", "round_straight(x / s).detach()"),
        (
            "clamp before rounding",
            "torch.clamp(round_straight(x / s), smallest, largest)",
            "round_straight(torch.clamp(x / s, smallest, largest))",
        ),
        (
            "inexact",
            "x + (torch.round(x) - x).detach()",
            "torch.round(x).detach() + x - x.detach()",
        ),
        (
            "gradient in x",
            "torch.autograd.grad(((back - x) ** 2).mean(), s)[0]",
            "torch.autograd.grad(((back - x) ** 2).mean() * 0.5, s)[0]",
        ),
        ("half up", "(torch.round(x) - x)", "(torch.floor(x + 0.5) - x)"),
    ],
    "A2-5": [
        ("wrong normalisation", "gradient / gradient.norm() * center.norm()", "gradient"),
        ("uphill", "center - radii", "center + radii"),
        ("no floor", "change.abs() > floor", "change.abs() > 0"),
        (
            "the point before",
            "values - objective(center[None])",
            "torch.cat([values[:1] - objective(center[None]), values.diff()])",
        ),
        ("missing clamp", "* direction).abs()", "* direction)"),
        ("sign", "-change.sign()", "change.sign()"),
        ("at least instead of more than", "change.abs() > floor", "change.abs() >= floor"),
        (
            "length of the gradient",
            "gradient / gradient.norm() * center.norm()",
            "gradient / gradient.norm()",
        ),
        ("lower only", "-change.sign()", "(change < 0).float()"),
        ("relative floor", "change.abs() > floor", "change.abs() > floor * center.norm()"),
    ],
    "A3-1": [
        ("wrong axis", "log_softmax(1)", "log_softmax(0)"),
        (
            "wrong normalisation",
            "F.normalize(outputs, dim=1), F.normalize(targets, dim=1)",
            "outputs, targets",
        ),
        (
            "wrong normalisation: columns",
            "F.normalize(outputs, dim=1)",
            "F.normalize(outputs, dim=0)",
        ),
        ("factor forgotten", "-2 * temperature *", "-1 *"),
        ("sum instead of mean", "diagonal().mean()", "diagonal().sum()"),
        ("off by one: the next image", "diagonal()", "roll(1, 1).diagonal()"),
        ("log of softmax", "similarity.log_softmax(1)", "similarity.softmax(1).log()"),
        (
            "exponentials",
            "similarity.log_softmax(1).diagonal()",
            "(similarity.diagonal() - similarity.exp().sum(1).log())",
        ),
        (
            "symmetric",
            "similarity.log_softmax(1).diagonal()",
            "(similarity.log_softmax(1) + similarity.log_softmax(0)).div(2).diagonal()",
        ),
        (
            "negatives only",
            "similarity.log_softmax(1).diagonal()",
            "(similarity.diagonal() - similarity.clone().fill_diagonal_(-math.inf).logsumexp(1))",
        ),
        ("temperature twice", "@ targets.T / temperature", "@ targets.T / temperature**2"),
    ],
    "A3-2": [
        ("off by one: the positive counts", ".fill_diagonal_(-math.inf)", ""),
        ("wrong axis", ".softmax(1)", ".softmax(0)"),
        ("wrong normalisation", "F.normalize(outputs, dim=1)", "outputs"),
        ("logarithm to base 2", "sum(1).exp()", "sum(1).div(math.log(2)).exp()"),
        ("mean before the exponential", "sum(1).exp().mean()", "sum(1).mean().exp()"),
        (
            "no temperature",
            "F.normalize(targets, dim=1).T / temperature",
            "F.normalize(targets, dim=1).T",
        ),
        ("zero instead of minus infinity", "-math.inf", "0.0"),
        ("a tensor for each image", ".exp().mean())", ".exp()[0])"),
        (
            "all images",
            "torch.special.entr(weights)",
            "(torch.special.entr(weights) * len(weights) / (len(weights) - 1))",
        ),
        ("squares", "torch.special.entr(weights).sum(1).exp()", "1 / (weights**2).sum(1)"),
    ],
    "A3-3": [
        ("off by one", "len(outputs) - stop <= 1", "len(outputs) - stop <= 2"),
        ("a single image", "len(outputs) - stop <= 1", "False"),
        (
            "the last batch dropped",
            "while start < len(outputs)",
            "while start + batch <= len(outputs)",
        ),
        ("wrong normalisation", "sum(losses) / len(losses)", "sum(losses) / len(outputs)"),
        ("wrong targets", "targets[start:stop]", "targets[: stop - start]"),
        ("all at once", "stop = start + batch", "stop = len(outputs)"),
        (
            "weighted by size",
            "losses.append(float(loss(outputs[start:stop], targets[start:stop])))",
            "losses += [float(loss(outputs[start:stop], targets[start:stop]))] * (stop - start)",
        ),
        ("the last pair joins", "len(outputs) - stop <= 1", "len(outputs) - stop < batch"),
        ("sum", "sum(losses) / len(losses)", "sum(losses)"),
    ],
    "A3-4": [
        ("no constant", "2 * temperature * math.log(len(outputs)) +", ""),
        ("factor forgotten", "+ 2 * centred", "+ centred"),
        ("wrong normalisation", "F.normalize(outputs, dim=1)", "outputs"),
        (
            "off by one: other images only",
            "similarity.mean() -",
            "(similarity.sum() - similarity.trace()) / (len(outputs) * (len(outputs) - 1)) -",
        ),
        ("sign", "+ 2 * centred", "- 2 * centred"),
        ("classes instead of images", "math.log(len(outputs))", "math.log(outputs.shape[1] + 1)"),
        ("temperature in the loss", "+ 2 * centred", "+ 2 * centred / temperature"),
        ("the logarithm of N - 1", "math.log(len(outputs))", "math.log(max(len(outputs) - 1, 1))"),
        (
            "plain cosine",
            "similarity.mean() - similarity.diagonal().mean()",
            "1 - similarity.diagonal().mean()",
        ),
    ],
    "A3-5": [
        (
            "test data in the fitness",
            "held_out(vector), temperature",
            "test_error(vector), temperature",
        ),
        (
            "test data read for each",
            "rows.append((held_out(vector)",
            "test_error(vector)\n        rows.append((held_out(vector)",
        ),
        ("the largest", "= min(rows", "= max(rows"),
        ("the last of equals", "min(rows,", "min(rows[::-1],"),
        ("another search", "test_error(vector)\n", "test_error(search(temperature))\n"),
        (
            "held-out error reported",
            "return temperature, test_error(vector)",
            "test_error(vector)\n    return temperature, held_out(vector)",
        ),
        ("sorted temperatures", "in temperatures:", "in sorted(temperatures):"),
        (
            "searched twice",
            "return temperature, test_error(vector)",
            "return temperature, test_error(search(temperature))",
        ),
        (
            "a list",
            "return temperature, test_error(vector)",
            "return [temperature, test_error(vector)]",
        ),
        ("ties by temperature", "key=lambda row: row[0]", "key=lambda row: row[:2]"),
    ],
    "A4-1": [
        (
            "biased",
            "(2 * torch.rand(len(parent), generator=generator) - 1)",
            "torch.rand(len(parent), generator=generator)",
        ),
        ("wrong normalisation", "- 1) * step", "- 1) * step / 2"),
        ("missing clamp", "(parent + noise).abs()", "parent + noise"),
        ("set to zero", "(parent + noise).abs()", "(parent + noise).clamp(min=0)"),
        ("wrong axis: one number for all", "torch.rand(len(parent),", "torch.rand(1,"),
        (
            "the global random state",
            "torch.rand(len(parent), generator=generator)",
            "torch.rand(len(parent))",
        ),
        (
            "normal noise",
            "(2 * torch.rand(len(parent), generator=generator) - 1)",
            "torch.randn(len(parent), generator=generator)",
        ),
        ("argument changed", "return (parent + noise)", "parent += noise\n    return parent"),
        (
            "dependent: a common sign",
            "- 1) * step",
            "- 1).abs() * step * (1 if torch.rand((), generator=generator) < 0.5 else -1)",
        ),
        (
            "dependent: mirrored",
            "return (parent + noise)",
            "half = len(noise) // 2\n    noise[half : 2 * half] = -noise[:half].flip(0)\n    return (parent + noise)",
        ),
        ("relative step", "- 1) * step", "- 1) * step * parent"),
        (
            "two noises",
            "return (parent + noise)",
            "noise = (noise + noise.flip(0)) / 2\n    return (parent + noise)",
        ),
    ],
    "A4-2": [
        ("off by one in the range", "torch.randint(len(ranked)", "torch.randint(len(ranked) - 1"),
        (
            "without replacement",
            "torch.randint(len(ranked), (size,), generator=generator)",
            "torch.randperm(len(ranked), generator=generator)[:size]",
        ),
        ("the worst", ".argmin()", ".argmax()"),
        (
            "the place in the draw",
            "int(drawn[ranked[drawn].argmin()])",
            "int(ranked[drawn].argmin())",
        ),
        ("NaN wins", ".nan_to_num(nan=math.inf)", ".nan_to_num(nan=-math.inf)"),
        ("no tournament", "int(drawn[ranked[drawn].argmin()])", "int(ranked.argmin())"),
        ("NaN as a large number", "nan=math.inf", "nan=1e9"),
        (
            "NaN as the largest of the others",
            ".nan_to_num(nan=math.inf)",
            ".nan_to_num(nan=float(torch.as_tensor(values).nan_to_num(nan=-1.0).max()))",
        ),
        (
            "a tensor",
            "return int(drawn[ranked[drawn].argmin()])",
            "return drawn[ranked[drawn].argmin()]",
        ),
        ("the global random state", ", (size,), generator=generator)", ", (size,))"),
        ("one draw", "(size,)", "(1,)"),
    ],
    "A4-3": [
        ("the best is dropped", "[:-1]", "[1:]"),
        (
            "off by one: it grows",
            "key=lambda member: member[0])[:-1]",
            "key=lambda member: member[0])",
        ),
        (
            "the child always stays",
            "self.members.append((value, child))",
            "self.members[-1] = (value, child)\n        self.members.append((math.inf, child))",
        ),
        (
            "NaN wins",
            "math.inf if value != value else value",
            "-math.inf if value != value else value",
        ),
        ("an equal one is better", "if value < self.best[1]", "if value <= self.best[1]"),
        (
            "the older goes first",
            "self.members.append((value, child))",
            "self.members.insert(0, (value, child))",
        ),
        ("best is a member", "self.best = (child, value)", "self.best = (value, child)"),
        ("not sorted", "sorted(self.members, key=lambda member: member[0])", "list(self.members)"),
        ("greedy", "self.members[winner][1]", "self.members[0][1]"),
        (
            "sorts vectors",
            "key=lambda member: member[0]",
            "key=lambda member: (member[0], float(member[1][0]))",
        ),
    ],
    "A4-4": [
        ("first to last", "reversed(chain.searchable)", "chain.searchable"),
        ("no commit", "objective.commit(vector)", "pass"),
        ("off by one", "range(passes)", "range(passes + 1)"),
        (
            "test data in the fitness",
            "value, visit = None, 0",
            'images = eq.load_demo("vit", 2).test[0][:4]\n    value, visit = None, 0',
        ),
        ("visits start again", "for block in reversed", "visit = 0\n        for block in reversed"),
        ("the value computed anew", "if value is None", "if True"),
        (
            "other images",
            "eq.BlockObjective(chain, block, images, targets)",
            "eq.BlockObjective(chain, block, images[:2], targets[:2])",
        ),
        (
            "best instead of last",
            "vector, value = search(objective, value, visit)",
            "vector, new = search(objective, value, visit)\n            value = min(value, new)",
        ),
        (
            "commits only if better",
            "            vector, value = search(objective, value, visit)\n            objective.commit(vector)",
            "            vector, new = search(objective, value, visit)\n            if new < value:\n                objective.commit(vector)\n            value = new",
        ),
        (
            "the best is returned",
            "return value",
            "return min(value, float(objective(objective.start[None])[0]))",
        ),
        ("counts from one", "value, visit = None, 0", "value, visit = None, 1"),
    ],
    "A4-5": [
        (
            "test data in the fitness",
            "objective = eq.",
            'images = eq.load_demo("vit", 2).test[0][:20]\n    objective = eq.',
        ),
        (
            "held-out data in the fitness",
            "objective = eq.",
            "images = setting(20, seed, 50)[2][0][:20]\n    objective = eq.",
        ),
        ("over the budget", "in range(steps)", "in range(steps + 1)"),
        (
            "nothing changed",
            "for module in chain.model.modules():",
            "return\n    for module in []:",
        ),
        ("missing clamp", "observer.params()[0])", "-observer.params()[0])"),
        ("not repeatable", "0.03 * (1", "0.03 * float(torch.rand(())) * (1"),
    ],
}

# Only hidden tests can tell, or only over many cases.
SUBTLE = {
    "A1-4": [
        ("the last share is not tried", "range(81)", "range(81 - (len(values) > 5000))"),
        ("mean of absolute errors", "- values) ** 2).mean()", "- values).abs()).mean()"),
        ("coarse shares", "range(81)", "range(0, 81, 2)"),
    ],
    "A2-3": [("the first six points", "kernel(points)", "kernel(points[:6][:3])")],
    "A2-4": [("right for signed integers only", "smallest, largest)\n", "min(smallest, -1), largest)\n")],
    "A3-3": [("batches of at most ten", "stop = start + batch", "stop = start + min(batch, 10)")],
    "A4-1": [
        (
            "dependent: neighbors share their size",
            "return (parent + noise)",
            "noise[1::2] = noise[: len(noise) // 2 * 2 : 2].abs() * noise[1::2].sign()\n"
            "    return (parent + noise)",
        ),
    ],
    "A4-3": [
        ("equal members by turns", "self.members.append((value, child))",
         "self.members.insert(len(self.members) // 2 if len(self.members) > 4 else 99, (value, child))"),
    ],
}  # fmt: skip


def right(text):
    """A right answer, without its indentation here."""
    return dedent(text).strip()


RIGHT = {
    "A1-1": [
        ("NumPy", right("""
            import numpy as np
            def scale_and_zero_point(lo, hi, bits, signed, symmetric):
                bottom = -(1 << (bits - 1)) if signed else 0
                top = bottom + (1 << bits) - 1
                lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
                if symmetric:
                    m = np.maximum(np.abs(lo), np.abs(hi))
                    return np.maximum(2 * m / (top - bottom), EPS), (0 if signed else 2 ** (bits - 1))
                scale = np.maximum((hi - lo) / (top - bottom), EPS)
                return scale, int(bottom - np.round(lo / scale))
        """)),
        ("torch", right("""
            def scale_and_zero_point(lo, hi, bits, signed, symmetric):
                lo = torch.tensor(min(lo, 0.0), dtype=torch.float64)
                hi = torch.tensor(max(hi, 0.0), dtype=torch.float64)
                q_lo = -(2 ** (bits - 1)) if signed else 0
                if symmetric:
                    hi = torch.maximum(-lo, hi)
                    lo = -hi
                scale = ((hi - lo) / (2**bits - 1)).clamp(min=EPS)
                z = 2 ** (bits - 1) + q_lo if symmetric else q_lo - torch.round(lo / scale)
                return float(scale), int(z)
        """)),
    ],
    "A1-2": [
        ("a loop", right("""
            def quantize_and_back(x, scale, zero_point, smallest, largest):
                out = torch.empty_like(x).flatten()
                for i, value in enumerate(x.flatten().tolist()):
                    q = min(max(round(value / scale) + zero_point, smallest), largest)
                    out[i] = (q - zero_point) * scale
                return out.view(x.shape)
        """)),
        ("NumPy", right("""
            import numpy as np
            def quantize_and_back(x, scale, zero_point, smallest, largest):
                q = np.clip(np.round(x.numpy() / scale) + zero_point, smallest, largest)
                return torch.from_numpy(np.asarray((q - zero_point) * scale, dtype=np.float32))
        """)),
        ("in place on its own", right("""
            def quantize_and_back(x, scale, zero_point, smallest, largest):
                y = x.clone()
                y.div_(scale).round_().add_(zero_point).clamp_(smallest, largest)
                return y.sub_(zero_point).mul_(scale)
        """)),
    ],
    "A1-3": [
        ("a loop over channels", right("""
            def quantize_per_channel(x, bits, axis):
                out, scales = torch.zeros(x.shape, dtype=torch.int8), []
                for c in range(x.shape[axis]):
                    part = x.select(axis, c)
                    s = max(2 * float(part.abs().max()) / (2**bits - 1), EPS)
                    q = torch.clamp(torch.round(part / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                    out.select(axis, c).copy_(q)
                    scales.append(s)
                return out, torch.tensor(scales)
        """)),
        ("NumPy", right("""
            import numpy as np
            def quantize_per_channel(x, bits, axis):
                a = x.numpy()
                others = tuple(i for i in range(a.ndim) if i != axis)
                s = np.maximum(2 * np.abs(a).max(axis=others, keepdims=True) / (2**bits - 1), EPS)
                q = np.clip(np.rint(a / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                return torch.from_numpy(q.astype(np.int8)), torch.from_numpy(s.reshape(-1))
        """)),
    ],
    "A1-4": [
        ("keeps one tensor, errors in float64", right("""
            class ClippingObserver:
                def __init__(self, integers):
                    self.integers, self.share, self.all = integers, None, torch.empty(0)
                def update(self, x):
                    self.all = torch.cat([self.all, x.reshape(-1)])
                def params(self):
                    if self.all.numel() == 0:
                        raise ValueError("update first")
                    lo, hi = self.all.min(), self.all.max()
                    found = []
                    for i in range(81):
                        share = (100 - i) / 100
                        p = eq.affine_params(lo * share, hi * share, self.integers, symmetric=False)
                        back = eq.fake_quantize(self.all, *p, self.integers)
                        found.append(float((back - self.all).double().square().mean()))
                    i = min(range(81), key=lambda i: found[i])
                    self.share = (100 - i) / 100
                    return eq.affine_params(
                        lo * self.share, hi * self.share, self.integers, symmetric=False
                    )
        """)),
        ("sums chunk by chunk", right("""
            class ClippingObserver:
                def __init__(self, integers):
                    self.integers = integers
                    self.share = None
                    self.batches = []
                def update(self, x):
                    self.batches.append(x.clone())
                def params(self):
                    if not self.batches:
                        raise ValueError("no batches")
                    lo = torch.stack([b.min() for b in self.batches]).min()
                    hi = torch.stack([b.max() for b in self.batches]).max()
                    n = sum(b.numel() for b in self.batches)
                    best = None
                    for share in [1 - 0.01 * i for i in range(81)]:
                        s, z = eq.affine_params(share * lo, share * hi, self.integers, symmetric=False)
                        e = sum(float((eq.fake_quantize(b, s, z, self.integers) - b).pow(2).sum())
                                for b in self.batches) / n
                        if best is None or e < best[0]:
                            best = e, s, z
                            self.share = share
                    return best[1], best[2]
        """)),
    ],
    "A1-5": [
        ("natural logarithm", right("""
            def bits_needed(x, decibels):
                b = 2
                while b <= 8:
                    r = eq.IntRange(b, True)
                    s, z = eq.affine_params(x.min(), x.max(), r, symmetric=True)
                    e = eq.fake_quantize(x, s, z, r) - x
                    if x.square().sum() >= 10 ** (decibels / 10) * e.square().sum():
                        return b
                    b += 1
        """)),
        ("float64", right("""
            def bits_needed(x, decibels):
                for bits in (2, 3, 4, 5, 6, 7, 8):
                    r = eq.IntRange(bits, signed=True)
                    e = eq.fake_quantize(x, *eq.affine_params(x.min(), x.max(), r, True), r) - x
                    ratio = float(x.double().pow(2).mean() / e.double().pow(2).mean())
                    if 10 * math.log10(ratio) >= decibels:
                        return bits
                return None
        """)),
    ],
    "A2-1": [
        ("loops", right("""
            def random_direction(center, seed, relative):
                g = torch.Generator()
                g.manual_seed(seed)
                u = torch.randn(center.shape, generator=g)
                if relative:
                    for i in range(len(u)):
                        u[i] *= abs(center[i])
                return u
            def walk(center, direction, radii):
                return torch.stack([torch.abs(center + r * direction) for r in radii])
        """)),
        ("outer product", right("""
            def random_direction(center, seed, relative):
                u = torch.empty(center.numel())
                torch.randn(center.numel(), generator=torch.Generator().manual_seed(seed), out=u)
                return u.mul_(center.abs()) if relative else u
            def walk(center, direction, radii):
                points = torch.outer(radii, direction)
                points += center
                return points.abs_()
        """)),
    ],
    "A2-2": [
        ("loops", right("""
            def total_variation(values):
                v = [float(x) for x in values]
                if max(v) == min(v):
                    return 0
                return sum(abs(a - b) for a, b in zip(v, v[1:])) / (max(v) - min(v))
            def local_minima(values, floor):
                v = values.tolist()
                count = 0
                for i in range(1, len(v) - 1):
                    if not v[i] < min(v[i - 1], v[i + 1]):
                        continue
                    left, j = v[i], i - 1
                    while j >= 0 and v[j] >= v[i]:
                        left, j = max(left, v[j]), j - 1
                    right, j = v[i], i + 1
                    while j < len(v) and v[j] >= v[i]:
                        right, j = max(right, v[j]), j + 1
                    count += min(left, right) - v[i] > floor
                return count
        """)),
        ("NumPy", right("""
            import numpy as np
            def total_variation(values):
                v = values.numpy()
                return float(np.abs(np.diff(v)).sum() / np.ptp(v)) if np.ptp(v) else 0.0
            def local_minima(values, floor):
                v = -values.numpy()
                tops = np.flatnonzero((v[1:-1] > v[:-2]) & (v[1:-1] > v[2:])) + 1
                return np.count_nonzero(peak_prominences(v, tops)[0] > floor)
        """)),
    ],
    "A2-3": [
        ("point by point", right("""
            def disagreement(kernels, points):
                worst = 0.0
                for point in points:
                    values = [float(kernel(point[None])[0]) for kernel in kernels]
                    worst = max(worst, max(values) - min(values))
                return worst
        """)),
        ("in chunks", right("""
            def disagreement(kernels, points):
                floors = []
                for part in points.split(2):
                    v = torch.stack([k(part) for k in kernels], dim=1)
                    floors.append((v.max(1).values - v.min(1).values).max())
                return max(floors)
        """)),
        ("running extremes", right("""
            def disagreement(kernels, points):
                low = high = kernels[0](points)
                for kernel in kernels[1:]:
                    v = kernel(points)
                    low, high = torch.minimum(low, v), torch.maximum(high, v)
                return (high - low).max().item()
        """)),
    ],
    "A2-4": [
        ("a function of its own", right("""
            class Straight(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x):
                    return torch.round(x)
                @staticmethod
                def backward(ctx, g):
                    return g
            def round_straight(x):
                return Straight.apply(x)
            def scale_gradient(x, scale, smallest, largest):
                s = scale.detach().clone().requires_grad_(True)
                loss = (s * round_straight(x / s).clamp(smallest, largest) - x).pow(2).mean()
                loss.backward()
                return s.grad
        """)),
        ("a difference", right("""
            def round_straight(x):
                return x - (x - x.round()).detach()
            def scale_gradient(x, scale, smallest, largest):
                s = torch.tensor(scale.item(), dtype=scale.dtype, requires_grad=True)
                q = torch.clamp(round_straight(x / s), min=smallest, max=largest)
                (g,) = torch.autograd.grad(torch.nn.functional.mse_loss(q * s, x), s)
                return g
        """)),
    ],
    "A2-5": [
        ("point by point, a list", right("""
            def downhill(objective, center, gradient, radii, floor):
                unit = gradient / gradient.norm()
                start = float(objective(center.unsqueeze(0)))
                out = []
                for r in radii.tolist():
                    point = torch.abs(center - r * center.norm() * unit)
                    change = float(objective(point.unsqueeze(0))) - start
                    out.append(1 if change < -floor else -1 if change > floor else 0)
                return out
        """)),
        ("all at once", right("""
            def downhill(objective, center, gradient, radii, floor):
                length = center.norm() / gradient.norm()
                points = torch.cat([center[None], (center - radii.outer(gradient * length)).abs()])
                values = objective(points)
                change = values[1:] - values[0]
                return (change < -floor).int() - (change > floor).int()
        """)),
    ],
    "A3-1": [
        ("a loop", right("""
            def contrast(outputs, targets, temperature):
                q = outputs / outputs.norm(dim=1, keepdim=True)
                k = targets / targets.norm(dim=1, keepdim=True)
                total = 0.0
                for i in range(len(q)):
                    s = (k @ q[i]) / temperature
                    total = total + torch.logsumexp(s, 0) - s[i]
                return 2 * temperature / len(q) * total
        """)),
        ("cross entropy", right("""
            def contrast(outputs, targets, temperature):
                s = F.cosine_similarity(outputs[:, None], targets[None], dim=2) / temperature
                return 2 * temperature * F.cross_entropy(s, torch.arange(len(s)))
        """)),
        ("the maximum subtracted", right("""
            def contrast(outputs, targets, temperature):
                s = F.normalize(outputs) @ F.normalize(targets).t()
                m = s.max(dim=1, keepdim=True).values
                lse = ((s - m) / temperature).exp().sum(1).log() + m[:, 0] / temperature
                return 2 * temperature * (lse - s.diag() / temperature).mean()
        """)),
    ],
    "A3-2": [
        ("a loop", right("""
            def effective_negatives(outputs, targets, temperature):
                q, k = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
                numbers = []
                for i in range(len(q)):
                    others = [j for j in range(len(q)) if j != i]
                    p = ((k[others] @ q[i]) / temperature).softmax(0)
                    numbers.append(math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0)))
                return sum(numbers) / len(numbers)
        """)),
        ("a mask", right("""
            def effective_negatives(outputs, targets, temperature):
                s = F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T
                mask = torch.eye(len(s), dtype=torch.bool)
                logp = (s / temperature).masked_fill(mask, -torch.inf).log_softmax(1)
                entropy = -(logp.exp() * logp.masked_fill(mask, 0)).sum(1)
                return entropy.exp().mean()
        """)),
    ],
    "A3-3": [
        ("split", right("""
            def in_batches(loss, outputs, targets, batch):
                a, b = list(outputs.split(batch)), list(targets.split(batch))
                if len(a) > 1 and len(a[-1]) == 1:
                    a[-2:], b[-2:] = [torch.cat(a[-2:])], [torch.cat(b[-2:])]
                return torch.stack([loss(x, y) for x, y in zip(a, b)]).mean()
        """)),
        ("ranges", right("""
            def in_batches(loss, outputs, targets, batch):
                n = len(outputs)
                cuts = list(range(0, n, batch)) + [n]
                if n % batch == 1 and len(cuts) > 2:
                    del cuts[-2]
                values = [loss(outputs[a:b], targets[a:b]).item() for a, b in zip(cuts, cuts[1:])]
                return sum(values) / len(values)
        """)),
    ],
    "A3-4": [
        ("a loop", right("""
            def high_temperature(outputs, targets, temperature):
                n = len(outputs)
                q, k = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
                mean = k.mean(0)
                loss = -sum(float(q[i] @ (k[i] - mean)) for i in range(n)) / n
                return 2 * (temperature * math.log(n) + loss)
        """)),
        ("a tensor", right("""
            def high_temperature(outputs, targets, temperature):
                s = F.cosine_similarity(outputs[:, None], targets[None], dim=-1)
                n = torch.tensor(float(len(s)))
                return 2 * temperature * n.log() + 2 * (s.mean(1) - s.diag()).mean()
        """)),
    ],
    "A3-5": [
        ("lists", right("""
            def choose_temperature(temperatures, search, held_out, test_error):
                vectors = [search(t) for t in temperatures]
                errors = [held_out(v) for v in vectors]
                i = errors.index(min(errors))
                return temperatures[i], test_error(vectors[i])
        """)),
        ("a running best", right("""
            def choose_temperature(temperatures, search, held_out, test_error):
                best = math.inf
                for t in temperatures:
                    v = search(t)
                    e = float(held_out(v))
                    if e < best:
                        best, chosen, vector = e, t, v
                return chosen, test_error(vector)
        """)),
    ],
    "A4-1": [
        ("a loop", right("""
            def mutate(parent, step, generator):
                child = parent.clone()
                draws = [torch.rand((), generator=generator) for _ in range(len(parent))]
                child += step * (2 * torch.stack(draws) - 1)
                return abs(child)
        """)),
        ("in place on its own", right("""
            def mutate(parent, step, generator):
                noise = torch.empty_like(parent).uniform_(-step, step, generator=generator)
                return noise.add_(parent).abs_()
        """)),
    ],
    "A4-2": [
        ("a loop", right("""
            def select(values, size, generator):
                winner = None
                for _ in range(size):
                    i = torch.randint(len(values), (1,), generator=generator).item()
                    v = float(values[i])
                    v = math.inf if math.isnan(v) else v
                    if winner is None or v < best:
                        winner, best = i, v
                return winner
        """)),
        ("min with a key", right("""
            def select(values, size, generator):
                drawn = torch.randint(0, len(values), (size,), generator=generator).tolist()
                return min(drawn, key=lambda i: (bool(values[i].isnan()), float(values[i])))
        """)),
        ("multinomial", right("""
            def select(values, size, generator):
                n = len(values)
                drawn = torch.multinomial(torch.ones(n), size, replacement=True, generator=generator)
                v = torch.where(values.isnan(), torch.inf, values)[drawn]
                return drawn[v.argmin()].item()
        """)),
    ],
    "A4-3": [
        ("bisect", right("""
            from bisect import bisect_right
            class Evolution:
                def __init__(self, start, value, step, population, tournament, seed, mutate, select):
                    self.generator = torch.Generator().manual_seed(seed)
                    self.step, self.tournament, self.mutate, self.select = step, tournament, mutate, select
                    self.members = [(value, start.clone()) for _ in range(population)]
                    self.best = (start.clone(), value)
                def ask(self):
                    values = torch.tensor([v for v, _ in self.members])
                    i = self.select(values, self.tournament, self.generator)
                    return self.mutate(self.members[i][1], self.step, self.generator)
                def tell(self, child, value):
                    if math.isnan(value):
                        value = math.inf
                    at = bisect_right([v for v, _ in self.members], value)
                    self.members.insert(at, (value, child.clone()))
                    self.members.pop()
                    if value < self.best[1]:
                        self.best = (child.clone(), value)
        """)),
        ("a loop", right("""
            class Evolution:
                def __init__(self, start, value, step, population, tournament, seed, mutate, select):
                    self.step, self.tournament = step, tournament
                    self.mutate, self.select = mutate, select
                    self.generator = torch.Generator()
                    self.generator.manual_seed(seed)
                    self.members = []
                    for _ in range(population):
                        self.members.append((value, start))
                    self.best = start, value
                def ask(self):
                    values = torch.stack([torch.as_tensor(m[0]) for m in self.members])
                    winner = self.select(values, self.tournament, self.generator)
                    return self.mutate(self.members[winner][1], self.step, self.generator)
                def tell(self, child, value):
                    if value != value:
                        value = float("inf")
                    i = len(self.members)
                    while i > 0 and self.members[i - 1][0] > value:
                        i -= 1
                    self.members = self.members[:i] + [(value, child)] + self.members[i:]
                    del self.members[-1]
                    if value < self.best[1]:
                        self.best = child, value
        """)),
    ],
    "A4-4": [
        ("one list of visits", right("""
            def evolve_blocks(chain, images, targets, passes, search):
                blocks = list(chain.searchable)[::-1] * passes
                for visit, block in enumerate(blocks):
                    objective = eq.BlockObjective(chain, block, images, targets)
                    if visit == 0:
                        value = objective(objective.start.unsqueeze(0)).item()
                    vector, value = search(objective, value, visit)
                    objective.commit(vector)
                return value
        """)),
    ],
}  # fmt: skip
