"""Mutants of the wirings: would the tables of the tests see one wrong sign?

    make mutants
    .venv/bin/python tests/mutants.py --only deepnorm --json mutants.json

Every function of `addnorm/wirings/*.py`, and what drops paths, is taken apart as a syntax tree.
Each operator, constant, axis, comparison, condition, pair of arguments or returned values and each
statement that is a call is changed by rule, each `with` and each decorator of ours left out, one at
a time: nothing is chosen by hand. Left alone is what is no formula: texts, types, asserts, raises,
`strict=` of zip, calls into torch.cuda.

A mutant is killed when one row of the tests that names its wiring goes red: rows of
`test_wirings.py` and `test_catalogue_*.py` whose parameters or code name it, or a class or function
that uses what was changed. Each runs in a forked process that puts the changed code into the live
functions, so that nothing is imported or registered again. Exits 1 when more than 2 % survive or
one that survives is not explained in EQUIVALENT.
"""

import __future__

import argparse
import ast
import collections
import copy
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import types
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/test_wirings.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_catalogue_*.py")),
]
SOURCES = {  # file: the functions to mutate, None for all
    **dict.fromkeys(["norm.py", "scale.py", "memory.py", "streams.py", "inversion.py"]),
    "../branches.py": ["keep_mask", "DropPath"],
}
NAMED = ("forward", "open", "close", "reset_parameters")  # counted by themselves as well
UNDECORATED = "undecorated"  # the rule that leaves a decorator out
MOST = 0.02  # of the mutants may survive
SECONDS = 60  # that one row may take, then it counts as killed
# Rows that hold the code against itself, or only ask whether it learns; each takes seconds. They
# are left out but for functions that ask whether they are compiled.
AGAINST_ITSELF = {
    "test_compiled_equals_eager",
    "test_exported_program_gives_the_same",
    "test_checkpointed_gradients_are_the_same",
    "test_short_training_lowers_the_loss",
    "test_stack_runs_wrapped_connections",
    "test_stack_under_torch_func",
}
GIBIBYTES = 8  # of address space that a mutant may take

# Survivors that no test can see, (where, before, after): why.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "MixLN.__init__",
        "self.post = site.layer < math.floor(fraction * site.layers + 1e-09)",
        "self.post = site.layer < math.floor(fraction * site.layers + 1.1000000000000001e-09)",
    ): "any number above rounding and below a layer",
    (
        "DepthAttention.forward",
        "p = torch.stack(scores, -1).softmax(-1).to(sources[0].dtype)",
        "p = torch.stack(scores, -1).softmax(-1).to(sources[1].dtype)",
    ): "all sources have one dtype",
    **{
        (
            "_equal",
            "return all(map(torch.equal, (states[0], *states[2]), (others[0], *others[2])))",
            f"return all(map(torch.equal, (states[0], *{a}), (others[0], *{b})))",
        ): "the generators of a GPU, of which there are none here"
        for a, b in (
            ("states[-2]", "others[2]"),
            ("states[0]", "others[2]"),
            ("states[2]", "others[-2]"),
            ("states[2]", "others[0]"),
        )
    },
    (
        "Inverted.forward",
        "if ctx.random and _equal(states, ctx.random[-1])",
        "if ctx.random and _equal(ctx.random[-1], states)",
    ): "equality is symmetric",
    (
        "Inverted.backward",
        "a = a.detach().requires_grad_()",
        "a = a.requires_grad_()",
    ): "nothing is recorded there",
    (
        "Inverted.backward",
        "own = [p.detach().requires_grad_() for p in parameters[count:]]",
        "own = [p.requires_grad_() for p in parameters[count:]]",
    ): "the parameters require gradients already",
    (
        "_as_before",
        "stack.enter_context(torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]))",
        "stack.enter_context(torch.autocast(kind, dtype=autocast[-1], enabled=autocast[0]))",
    ): "a pair has two",
    **{
        ("_as_before", before, after): "the generators of a GPU"
        for before, after in (
            ("set_device_states(devices, states, device_type=kind)", "pass"),
            (
                "set_device_states(devices, states, device_type=kind)",
                "set_device_states(states, devices, device_type=kind)",
            ),
        )
    },
    **{
        (
            "sinkhorn",
            "matrix = torch.exp(below.clamp(min=-80))",
            f"matrix = torch.exp(below.clamp(min={floor}))",
        ): "any floor that float32 holds and that is far below 1"
        for floor in (-79, -81, -88.0)
    },
    **{
        (
            "GTrXL.__init__",
            f"self.{a}, self.{b} = (self.new_linear(D, D), self.new_linear(D, D))",
            f"self.{b}, self.{a} = (self.new_linear(D, D), self.new_linear(D, D))",
        ): "both are new matrices of one kind"
        for a, b in (("reset_y", "reset_x"), ("update_y", "update_x"), ("new_y", "new_x"))
    },
    (
        "DropoutShortcut.forward",
        "m = (torch.rand_like(stream) < keep).to(stream.dtype) if self.training else keep",
        "m = (torch.rand_like(stream) <= keep).to(stream.dtype) if self.training else keep",
    ): "a random number meets the bound with probability 0",
    (
        "keep_mask",
        "return (torch.rand(shape, device=x.device) < keep).to(x.dtype)",
        "return (torch.rand(shape, device=x.device) <= keep).to(x.dtype)",
    ): "a random number meets the bound with probability 0",
    (
        "UNet.__init__",
        "layer, half = (site.index // site.parts, site.count // site.parts // 2)",
        "layer, half = (site.index / site.parts, site.count // site.parts // 2)",
    ): "a fraction is below a whole number when its whole part is, and takes asks for part 0",
    (
        "UNet.__init__",
        "layer, half = (site.index // site.parts, site.count // site.parts // 2)",
        "layer, half = (site.index // site.parts, site.count / site.parts // 2)",
    ): "the parts divide the count",
    (
        "_as_before",
        "stack.enter_context("
        "torch.random.fork_rng(devices, device_type=kind if devices else 'cuda'))",
        "stack.enter_context("
        "torch.random.fork_rng(devices, device_type=kind if not devices else 'cuda'))",
    ): "without devices any kind does; with devices it is for a GPU, which this machine has not",
    (
        "DepthAttention.forward",
        "return sum_of((q * v for q, v in zip(torch.split(p, 1, -1), sources, strict=True)))",
        "return sum_of((q * v for q, v in zip(sources, torch.split(p, 1, -1), strict=True)))",
    ): "q v = v q",
    (
        "mix",
        "if torch.compiler.is_compiling()",
        "if not torch.compiler.is_compiling()",
    ): "two ways to write one product",
    (
        "Generator.__init__",
        "self.reset_parameters()",
        "pass",
    ): "its owner resets it again",
    (
        "GatedRead.__init__",
        "self.reset_parameters()",
        "pass",
    ): "its owner resets it again",
    (
        "Krom.check",
        "n = options.get('n', 4)",
        "n = options.get('n', 0)",
    ): "the default is not refused either way",
    (
        "Krom.check",
        "if n & n - 1",
        "if n & n - 2",
    ): "the same for every n from 2 on",
    (
        "Krom.kronecker",
        "factors = torch.stack((pairs, pairs.flip(-1)), -2).unbind(-3)",
        "factors = torch.stack((pairs, pairs.flip(-1)), -1).unbind(-3)",
    ): "U is symmetric",
    (
        "sinkhorn",
        "matrix = matrix / matrix.sum(-2, keepdim=True)",
        "matrix = matrix / matrix.mean(-2, keepdim=True)",
    ): "the sums of the rows take a common factor out",
    (
        "Reversible.close",
        "return (stream[0] + stream[1]) / 2",
        "return (stream[0] + stream[-1]) / 2",
    ): "a pair has two",
    (
        "_random_again",
        "if state[1] is not None",
        "if state[-1] is not None",
    ): "a pair has two",
    ("Reversible.present", "return stream[1]", "return stream[-1]"): "a pair has two",
    **{
        ("Inverted.backward", "a, b = (b - f.detach(), a.detach())", after): (
            "a backward pass records nothing, and a is detached again in front of each connection"
        )
        for after in ("a, b = (b - f, a.detach())", "a, b = (b - f.detach(), a)")
    },
    (
        "Inverted.forward",
        "device = pair[0].device.type",
        "device = pair[1].device.type",
    ): "both lie on one device",
}


# -- making mutants ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One changed function: where, which statement, and the whole function as text."""

    file: str
    line: int
    place: str  # MHC.forward
    operator: str
    before: str  # the statement
    after: str
    source: str  # the function after the change

    @property
    def key(self):
        return self.place, self.before, self.after

    @property
    def named(self):
        return self.place.split(".")[-1] in NAMED

    def __str__(self):
        where = f"{self.file}:{self.line} {self.place} ({self.operator})"
        return f"{where}\n    - {self.before}\n    + {self.after}"


BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Add, ast.BitAnd: ast.BitOr,
}  # fmt: skip
ORDERED = (ast.Sub, ast.Div, ast.Pow, ast.MatMult, ast.FloorDiv, ast.Mod)
COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
CALLS = {
    "sigmoid": "tanh", "tanh": "sigmoid", "relu": "sigmoid", "silu": "sigmoid", "sum": "mean",
    "mean": "sum", "softmax": "log_softmax", "exp": "square", "square": "abs", "rsqrt": "sqrt",
    "sqrt": "log", "log": "sqrt", "amax": "amin", "max": "min", "min": "max", "floor": "ceil",
    "zeros_": "ones_", "ones_": "zeros_", "eye_": "ones_", "zero_": "detach",
    "xavier_normal_": "kaiming_normal_", "kaiming_normal_": "xavier_normal_",
}  # fmt: skip
DROPPED = ("mT", "detach", "flip")
UNORDERED = ("max", "min")


def mutants_of(path, only=None):
    """Yield every mutant of the functions of a file, or of those named, in the file's order."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    ours = {top.name for top in body if isinstance(top, ast.FunctionDef)}
    for top in body:
        if only is not None and getattr(top, "name", None) not in only:
            continue
        if isinstance(top, ast.FunctionDef):
            yield from mutants_of_function(path.name, top.name, top)
        elif isinstance(top, ast.ClassDef):
            for function in top.body:
                if isinstance(function, ast.FunctionDef):
                    place = f"{top.name}.{function.name}"
                    yield from undecorated(path.name, place, function, ours)
                    yield from mutants_of_function(path.name, place, function)


def undecorated(file, place, function, ours):
    """Yield a mutant for each decorator that is a function of the same file."""
    for decorator in function.decorator_list:
        if names_in(decorator) & ours:
            before, source = f"@{ast.unparse(decorator)}", ast.unparse(function)
            yield Mutant(file, decorator.lineno, place, UNDECORATED, before, "", source)


def mutants_of_function(file, place, function):
    """Yield the mutants of one function; those with the bytecode of another are left out."""
    tree = copy.deepcopy(function)
    tree.decorator_list = []
    seen = {essence(place, ast.unparse(tree))}
    for parent, name, index, node, statement in places_in(tree):
        before = heading(statement)
        for operator, other in replacements(node, parent, name):
            put(parent, name, index, other)
            after = heading(other if node is statement else statement)
            source = ast.unparse(tree)
            put(parent, name, index, node)
            found = essence(place, source)
            if found not in seen:
                seen.add(found)
                yield Mutant(file, node.lineno, place, operator, before, after, source)


def put(parent, name, index, node):
    """Set one child of a node."""
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def places_in(node, statement=None):
    """Yield (parent, field, index, child, its statement) for all that may be changed below."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or left_alone(child):
                continue
            own = child if isinstance(child, ast.stmt) else (statement or node)
            yield node, name, index, child, own
            if number(child) is None:
                yield from places_in(child, own)


def left_alone(node):
    """Whether this is no formula: see the top of the file."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.Expr):
        return left_alone(node.value)
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda.")


def heading(statement):
    """Return a statement as text, of a compound one its first line."""
    statement = copy.copy(statement)
    if isinstance(statement, ast.FunctionDef):
        return f"def {statement.name}({ast.unparse(statement.args)})"
    if hasattr(statement, "body"):
        statement.body = [ast.Expr(ast.Constant(...))]
        statement.orelse = []
        return ast.unparse(statement).split(":\n")[0]
    return ast.unparse(statement)


def number(node):
    """Return the value of a number or truth value with its sign, None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(node.operand)
        return None if value is None else -value
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, bool | int | float) else None


def literal(value):
    """Return a number as a syntax tree."""
    if value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def other_numbers(value):
    """Return what a number is replaced by."""
    if isinstance(value, bool):
        return [not value]
    others = [value + 1, -value, 0 * abs(value)]
    if isinstance(value, float):
        others.append(1.1 * value)
    elif value < 0:
        others.append(value - 1)
    return [other for other in dict.fromkeys(others) if other != value]


def replacements(node, parent, name):
    """Yield (rule, new node) for each rule that fits a node."""
    value = number(node)
    if value is not None:
        for other in other_numbers(value):
            yield "constant", literal(other)
        return
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in BINARY:
                yield "operator", ast.BinOp(left, BINARY[type(op)](), right)
            if isinstance(op, ORDERED):
                yield "swap", ast.BinOp(right, op, left)
        case ast.AugAssign(target, op, augment) if type(op) in BINARY:
            yield "operator", ast.AugAssign(target, BINARY[type(op)](), augment)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "sign", operand
        case ast.BoolOp(op, values):
            yield "operator", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for new in COMPARED[type(op)]:
                    yield (
                        "compare",
                        ast.Compare(left, [*ops[:i], new(), *ops[i + 1 :]], comparators),
                    )
        case ast.Attribute(inner, attribute) if attribute in DROPPED and name != "func":
            yield "drop", inner
        case ast.Call(func, arguments, keywords):
            called = getattr(func, "attr", getattr(func, "id", None))
            if called in CALLS:
                yield "call", ast.Call(renamed(func, CALLS[called]), arguments, keywords)
            if called in DROPPED and isinstance(func, ast.Attribute):
                yield "drop", func.value
            plain = len(arguments) == 2 and not any(isinstance(a, ast.Starred) for a in arguments)
            if plain and called not in UNORDERED:
                yield "swap", ast.Call(func, arguments[::-1], keywords)
        case ast.Tuple(elements) if isinstance(parent, ast.Return | ast.Assign | ast.IfExp):
            yield "swap", ast.Tuple(elements[::-1], node.ctx)
        case ast.With(body=body):
            yield "context", ast.If(ast.Constant(value=True), body, [])
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "delete", ast.Pass()
        case ast.Assign([ast.Subscript()]):
            yield "delete", ast.Pass()
        case ast.Assign([ast.Name(target)], assigned) if target in names_in(assigned):
            yield "delete", ast.Pass()
    decides = isinstance(parent, ast.If | ast.IfExp | ast.While) and name == "test"
    if (decides or name == "ifs") and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield "condition", ast.UnaryOp(ast.Not(), node)


def renamed(func, name):
    """Return what is called under another name."""
    if isinstance(func, ast.Attribute):
        return ast.Attribute(func.value, name, ast.Load())
    return ast.Name(name, ast.Load())


def names_in(tree):
    """Return the plain names that are read in a syntax tree."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


# -- from text to live functions ---------------------------------------------------------------


def compiled(place, source, free=()):
    """Return the code objects of a function by qualified name, the nested ones included."""
    *owner, _ = place.split(".")
    body = ast.parse(source).body
    if free:  # what only the deleted statement named stays a free variable
        dead = "if 0:\n    " + "\n    ".join(free)
        body[0].body += ast.parse(dead).body
    for name in reversed(owner):
        body = [ast.ClassDef(name, [], [], body, [])]
    module = ast.fix_missing_locations(ast.Module(body, []))
    flags = __future__.annotations.compiler_flag
    code = compile(module, place, "exec", flags, dont_inherit=True)
    return {c.co_qualname: c for c in nested(code) if not c.co_qualname.startswith("<")}


def nested(code):
    """Yield all code objects inside one."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from nested(constant)


def essence(place, source):
    """Return what a function does, whatever its text: its bytecode, and the defaults."""

    def of(code):
        constants = [of(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return repr((code.co_code, constants, names))

    arguments = ast.parse(source).body[0].args
    return of(compiled(place, source)[place]), ast.unparse(arguments)


def live_functions(paths):
    """Return every function object made in these files, by file and qualified name.

    A wrapper that a decorator of these files makes stands at "around " and that name as well.
    """
    live = collections.defaultdict(list)
    files = {str(path.resolve()): path.name for path in paths}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename in files:
            live[files[thing.__code__.co_filename], thing.__code__.co_qualname].append(thing)
            if inner := vars(thing).get("__wrapped__"):
                live[files[thing.__code__.co_filename], f"around {inner.__qualname__}"].append(
                    thing
                )
    return live


def install(mutant, live):
    """Put the changed code into the live functions."""
    targets = live[mutant.file, mutant.place]
    assert targets, f"{mutant.place} is not alive"
    if mutant.operator == UNDECORATED:  # the wrapper keeps its place and calls the method alone
        scope = {}
        exec("def around(method):\n    return lambda self, x: method(self, x)", scope)
        for function in live[mutant.file, f"around {mutant.place}"]:
            function.__code__ = scope["around"](None).__code__
        return
    codes = compiled(mutant.place, mutant.source)
    free = targets[0].__code__.co_freevars
    if codes[mutant.place].co_freevars != free:
        codes = compiled(mutant.place, mutant.source, free)
    for name, code in codes.items():
        for function in live[mutant.file, name]:
            function.__code__ = code
    arguments = ast.parse(mutant.source).body[0].args
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            for function in targets:
                function.__kwdefaults__[argument.arg] = ast.literal_eval(default)


# -- which rows look at it ---------------------------------------------------------------------


def users_of(paths):
    """Return for each class and function the names of all that use it, and of their wirings."""
    uses, wiring = {}, {}
    for path in paths:
        for top in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(top, ast.ClassDef | ast.FunctionDef):
                uses[top.name] = names_in(top) - {top.name}
                for line in top.body:
                    match line:
                        case ast.Assign([ast.Name("name")], ast.Constant(str(name))):
                            wiring[top.name] = name
    users = {}
    for name in uses:
        found, new = set(), {name}
        while new:
            found |= new
            new = {user for user, used in uses.items() if used & new} - found
        users[name] = found | {wiring[user] for user in found if user in wiring}
    return users


def named_by(item):
    """Return the names in the parameters and the code of a test, of a spec what precedes `(`."""
    texts = set()

    def note(value):
        if isinstance(value, str):
            texts.add(re.match(r"[\w-]*", value).group())
        elif isinstance(value, type):
            texts.add(value.__name__)
        elif isinstance(value, dict):
            note([*value, *value.values()])
        elif isinstance(value, list | tuple | set | frozenset):
            for part in value:
                note(part)

    code = item.function.__code__
    for each in (code, *nested(code)):
        note([*each.co_names, *each.co_consts])
    note(getattr(item, "callspec", None) and list(item.callspec.params.values()))
    return texts


# -- running them ------------------------------------------------------------------------------


def in_children(tasks, work, jobs):
    """Yield (task, work(task)) as they end, each in a forked process; None where that died."""
    fork = multiprocessing.get_context("fork")
    tasks, running = iter(tasks), {}

    def child(pipe, task):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
        pipe.send(work(task))
        pipe.close()
        os._exit(0)

    while True:
        for task in tasks:
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(theirs, task))
            process.start()
            theirs.close()
            running[ours] = task, process
            if len(running) == jobs:
                break
        if not running:
            return
        for ours in wait(list(running)):
            task, process = running.pop(ours)
            try:
                result = ours.recv()
            except EOFError:
                result = None
            process.join()
            yield task, result


class Judge:
    """A pytest plugin that runs the rows on every mutant in place of running them once."""

    def __init__(self, mutants, paths, jobs, progress):
        self.mutants = mutants
        self.paths = paths
        self.jobs = jobs
        self.progress = progress
        self.failed = False
        self.red = []  # rows that killed a mutant, but fail without any change too
        self.killers = {}  # mutant: the row that killed it; survivors have None

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def is_red(self, item):
        """Run one row; a process that takes too long is ended by the system."""
        self.failed = False
        signal.alarm(SECONDS)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        signal.alarm(0)
        return self.failed

    def pytest_runtestloop(self, session):
        reporter = session.config.pluginmanager.unregister(name="terminalreporter")
        assert reporter is not None
        assert not session.testsfailed, "the tests cannot be collected"
        users = users_of(self.paths)
        live = live_functions(self.paths)
        names = [named_by(item) for item in session.items]
        rows = {
            top: [i for i, named in enumerate(names) if named & users[top]]
            for top in {mutant.place.split(".")[0] for mutant in self.mutants}
        }
        tests = [item.originalname for item in session.items]
        kills, spent = collections.Counter(), collections.Counter()  # by test function
        used = sorted(set().union(*rows.values()))
        for i in {tests[i]: i for i in reversed(used)}.values():
            self.is_red(session.items[i])  # once here, or every child imports what it needs first
        gc.collect()
        gc.freeze()  # or every child copies what its collector touches

        def judge(task):
            mutant, order = task
            install(mutant, live)
            seconds = collections.Counter()
            for i in order:
                since = time.perf_counter()
                red = self.is_red(session.items[i])
                seconds[tests[i]] += time.perf_counter() - since
                if red:
                    return i, seconds
            return None, seconds

        def queue():  # what kills most per second first; the verdict does not depend on it
            for mutant in self.mutants:
                order = rows[mutant.place.split(".")[0]]
                if "is_compiling" not in mutant.source:
                    order = [i for i in order if tests[i] not in AGAINST_ITSELF]
                worth = {test: (1 + kills[test]) / (1 + spent[test]) for test in tests}
                yield mutant, sorted(order, key=lambda i: -worth[tests[i]])

        killers = set()
        for (mutant, _), verdict in in_children(queue(), judge, self.jobs):
            killer, seconds = verdict or (-1, {})
            spent.update(seconds)
            if killer is None:
                self.killers[mutant] = None
            elif killer < 0:
                self.killers[mutant] = "the process died or took too long"
            else:
                self.killers[mutant] = session.items[killer].nodeid
                kills[tests[killer]] += 1
                killers.add(killer)
            if self.progress and sys.stderr.isatty():
                print(f"{len(self.killers)} of {len(self.mutants)}", end="\r", file=sys.stderr)
            if self.progress and self.killers[mutant] is None and mutant.key not in EQUIVALENT:
                print(f"alive: {mutant}", file=sys.stderr, flush=True)

        def red_among(some):
            return [i for i in some if self.is_red(session.items[i])]

        shares = [sorted(killers)[k :: self.jobs] for k in range(self.jobs)]
        for share, red in in_children(shares, red_among, self.jobs):
            self.red += [session.items[i].nodeid for i in (share if red is None else red)]
        return True


def judged(mutants, paths, tests, jobs=2, progress=False):
    """Return the judge after it has run the rows of the tests on the mutants."""
    judge = Judge(mutants, paths, jobs, progress)
    quiet = ["-qq", "-s", "--tb=no", "--no-header", "--no-summary", "-m", "not slow"]
    off = [
        "xdist",
        "logging",
        "cacheprovider",
        "unraisableexception",
        "threadexception",
    ]
    options = [*quiet, *(word for name in off for word in ("-p", f"no:{name}"))]
    options += ["-o", "addopts=", "-o", "faulthandler_timeout=0"]  # SIGALRM ends what hangs
    pytest.main([*options, *map(str, tests)], plugins=[judge])
    return judge


# -- the account -------------------------------------------------------------------------------


def report(killers):
    """Print the score by file and every survivor; return the share of survivors and the unknown."""
    counts = collections.defaultdict(lambda: [0, 0])
    for mutant, killer in killers.items():
        for key in (mutant.file, "all", *(["of " + ", ".join(NAMED)] if mutant.named else [])):
            counts[key][0] += 1
            counts[key][1] += killer is None
    print(f"{'mutants':>8} {'killed':>8} {'survive':>8}")
    for key, (total, alive) in sorted(counts.items(), key=lambda kv: (kv[0] == "all", kv[0])):
        print(f"{total:8} {total - alive:8} {alive:8}  {100 * alive / total:5.1f} %  {key}")
    alive = [mutant for mutant, killer in killers.items() if killer is None]
    for mutant in alive:
        if mutant.key in EQUIVALENT:
            print(f"\nequivalent: {mutant}\n    {EQUIVALENT[mutant.key]}")
    unknown = [mutant for mutant in alive if mutant.key not in EQUIVALENT]
    for mutant in unknown:
        print(f"\nSURVIVES: {mutant}")
    return len(alive) / max(len(killers), 1), unknown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a wiring, class, function or file")
    parser.add_argument("--json", type=Path, help="write all mutants with what killed them")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    since = time.perf_counter()
    os.chdir(ROOT)
    folder = ROOT / "addnorm" / "wirings"
    sources = {(folder / name).resolve(): only for name, only in SOURCES.items()}
    mutants = [m for path, only in sources.items() for m in mutants_of(path, only)]
    if options.only:
        users = users_of(sources)
        own = {name for name, used_by in users.items() if options.only in (name, *used_by)}
        exact = {options.only} & users.keys() or own
        mutants = [m for m in mutants if {m.file, m.place.split(".")[0]} & {options.only, *exact}]
    judge = judged(mutants, list(sources), TESTS, options.jobs, progress=True)
    if options.json:
        known = [
            {**asdict(m), "killed_by": killer, "reason": EQUIVALENT.get(m.key)}
            for m, killer in judge.killers.items()
        ]
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    share, unknown = report({m: judge.killers[m] for m in mutants if m in judge.killers})
    stale = {key for m in judge.killers if judge.killers[m] for key in [m.key]} & EQUIVALENT.keys()
    for key in sorted(stale):
        print("\nexplained as equivalent, but killed:", *key, sep="\n    ")
    for row in judge.red:
        print(f"fails without any change, its verdicts are void: {row}")
    print(f"\n{len(mutants)} mutants, {100 * share:.1f} % survive, ", end="")
    print(f"{len(unknown)} unexplained, {time.perf_counter() - since:.0f} s")
    whole = len(judge.killers) == len(mutants) > 0
    sys.exit(int(not whole or share > MOST or bool(unknown) or bool(stale) or bool(judge.red)))


if __name__ == "__main__":
    main()
