"""Wrong answers to the assignments' exercises, for test_assignments.py.

Exercise -> (what is wrong, a piece of the solution, what a student wrote instead): the six typical
mistakes wherever an exercise has room for them, and some of its own.
"""

WRONG = {
    "A1-1": [
        ("off by one in the range", "steps = 2**bits - 1", "steps = 2**bits"),
        ("missing clamp", "lo, hi = min(lo, 0.0), max(hi, 0.0)", "pass"),
        ("biased rounding", "round(lo / scale)", "math.floor(lo / scale)"),
        ("biased rounding: cut off", "round(lo / scale)", "int(lo / scale)"),
        ("wrong normalisation", "2 * max(-lo, hi) / steps", "max(-lo, hi) / steps"),
        ("wrong side", "smallest - round", "smallest + round"),
        ("no smallest scale", "max((hi - lo) / steps, EPS)", "(hi - lo) / steps + 1e-12"),
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
    ],
    "A1-3": [
        ("off by one in the range", "2 ** (bits - 1) - 1\n", "2 ** (bits - 1)\n"),
        ("wrong axis", "x.movedim(axis, 0)", "x.movedim(axis - 1, 0)"),
        ("missing clamp", ".clamp(-largest - 1, largest)", ""),
        ("biased rounding", "torch.round(x", "torch.trunc(x"),
        ("wrong normalisation", "2 * rows.abs()", "rows.abs()"),
        ("largest instead of magnitude", "rows.abs().amax(1)", "rows.amax(1)"),
        ("floats", "q.to(torch.int8)", "q"),
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
    ],
    "A1-5": [
        ("off by one in the range", "range(2, 9)", "range(2, 8)"),
        ("off by one at the start", "range(2, 9)", "range(3, 9)"),
        ("wrong normalisation", "10 * torch.log10", "20 * torch.log10"),
        ("mean magnitude", "(x**2).sum() / (noise**2).sum()", "x.abs().sum() / noise.abs().sum()"),
        ("natural logarithm", "torch.log10", "torch.log"),
        ("8 instead of None", "return None", "return 8"),
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
    ],
    "A2-2": [
        ("wrong normalisation", "/ span if span > 0", "/ len(values) if span > 0"),
        ("no magnitude", "values.diff().abs()", "values.diff()"),
        ("maxima", "-values.numpy()", "values.numpy()"),
        ("no floor", "max(floor, 1e-12)", "1e-12"),
        (
            "off by one",
            "prominence=max(floor, 1e-12))[0])",
            "prominence=max(floor, 1e-12))[0]) + 1",
        ),
        ("a constant", " if span > 0 else 0.0", " if span > 0 else 1.0"),
    ],
    "A2-3": [
        ("wrong axis", "(values.amax(0) - values.amin(0))", "(values.amax(1) - values.amin(1))"),
        ("mean instead of largest", ".max())", ".mean())"),
        ("the first two only", "for kernel in kernels", "for kernel in kernels[:2]"),
        ("sign", "(values.amax(0) - values.amin(0))", "(values[1] - values[0])"),
        ("standard deviation", "(values.amax(0) - values.amin(0))", "values.std(0)"),
        ("half of it", "(values.amax(0) - values.amin(0))", "(values.amax(0) - values.mean(0))"),
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
        ("over the budget", "3 * steps)", "3 * steps + 3)"),
        (
            "nothing changed",
            "for module in chain.model.modules():",
            "return\n    for module in []:",
        ),
        ("missing clamp", "observer.params()[0])", "-observer.params()[0])"),
        ("not repeatable", "0.03", "0.03 * float(torch.rand(()))"),
    ],
}
