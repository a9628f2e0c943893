"""Single-point mutants of Python source, of the kinds that a reviewer writes by hand.

A mutant is one edit of the text, found with `ast`; so its line numbers are the source's own, and its diff is short.
Left alone: docstrings, annotations, imports, error messages, printed and logged text, representations.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import unified_diff

_ARITHMETIC: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/", "+")),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("/", "%")),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitAnd: ("&", ("|",)),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_OPPOSITES = ("min max", "minimum maximum", "amin amax", "argmin argmax", "floor ceil", "any all", "sum mean")
_OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair.split(), pair.split()[::-1])}
_OF_TENSORS = {"sum", "mean"}
# Methods and functions whose call gives way to what it is called on.
_METHODS = {
    "abs",
    "clamp",
    "clone",
    "contiguous",
    "copy",
    "detach",
    "double",
    "eval",
    "float",
    "lower",
    "resolve",
    "round",
    "sqrt",
    "strip",
}
_FUNCTIONS = {"abs", "ceil", "copy", "deepcopy", "float", "floor", "int", "list", "reversed", "round", "sorted", "sqrt"}
_DECORATORS = {"no_grad", "inference_mode", "once_differentiable"}
_SAID = {"print", "warn", "debug", "info", "warning", "error", "exception"}
_SAME_EITHER_WAY = {
    "min",
    "max",
    "minimum",
    "maximum",
    "isinstance",
    "issubclass",
    "equal",
    "allclose",
    "isclose",
    "dot",
    "gcd",
    "promote_types",
    "add",
    "mul",
}
_MUST_BE_SO = {"getattr", "setattr", "hasattr", "cast", "TypeVar", "field", "open", "super", "partial"}
# Of speed and memory alone, or of text; and `device`, where no machine of the tests has two.
_KEYWORDS_KEPT = {"strict", "stacklevel", "encoding", "help", "flush", "file", "inplace", "non_blocking", "device"}
_FOLDERS = {"root", "out", "folder", "path", "directory", "parent", "cache", "source", "run", "tmp", "scratch", "Path"}
_TEXTS = {"__repr__", "__str__", "extra_repr"}
_LISTED = (ast.List, ast.Tuple, ast.ListComp, ast.Dict)
_ALIKE = (ast.Name, ast.Attribute, ast.Subscript)


@dataclass(frozen=True)
class Mutant:
    """One edit: the text from byte `start` to `stop` of `path` becomes `text`.

    place: the function or class around it. was, becomes: the lines that change, without indent; with `path`, `place`
    and `nth` (which of several like edits) they name the mutant for as long as those lines stand, wherever they move.
    lines: the lines that a test must run to see it.
    """

    path: str
    place: str
    kind: str
    line: int
    start: int
    stop: int
    text: str
    was: str
    becomes: str
    lines: tuple[int, ...]
    nth: int = 0

    @property
    def key(self) -> str:
        parts = self.path, self.place, self.was, self.becomes, str(self.nth)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def diff(self, source: bytes) -> str:
        old, new = (text.decode().splitlines() for text in (source, self.apply(source)))
        return "\n".join(unified_diff(old, new, self.path, self.path, n=1, lineterm=""))


def find_mutants(path: str, source: bytes) -> list[Mutant]:
    """Every edit of a file, in its order.

    >>> [each.becomes for each in find_mutants("a.py", b"def f(x):\\n    return x < 3\\n")]
    ['return x <= 3', 'return x < 4', 'return x < 2']
    """
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    seen: dict[tuple[str, ...], int] = {}
    found = []
    for each in sorted(finder.found, key=lambda each: each.start):
        name = each.place, each.was, each.becomes
        seen[name] = seen.get(name, -1) + 1
        found.append(replace(each, nth=seen[name]))
    return found


def sample(mutants: list[Mutant], count: int, seed: int, sources: dict[str, bytes]) -> list[Mutant]:
    """As many of each kind as there are, at most one a line, in an order that the mutants' names and the seed give.

    So a change elsewhere in the source hardly changes what is drawn. What does not compile is passed over.
    """
    rank = {each: hashlib.sha256(f"{seed} {each.key}".encode()).hexdigest() for each in mutants}
    kinds: dict[str, list[Mutant]] = {}
    for each in sorted(mutants, key=rank.__getitem__, reverse=True):
        kinds.setdefault(each.kind, []).append(each)
    drawn: list[Mutant] = []
    taken: set[tuple[str, int]] = set()
    order = sorted(kinds, key=lambda kind: rank[kinds[kind][-1]])
    while len(drawn) < count and any(kinds.values()):
        for kind in order:
            while kinds[kind]:
                each = kinds[kind].pop()
                if (each.path, each.line) not in taken and _compiles(each, sources[each.path]):
                    taken.add((each.path, each.line))
                    drawn.append(each)
                    break
    return drawn[:count]


def _compiles(mutant: Mutant, source: bytes) -> bool:
    """Whether the mutant is Python, and other code than the source."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _name(node: ast.expr) -> str:
    """The last name of a call's function, `no_grad` of `torch.no_grad`."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _is_int(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source, self.found = path, source, list[Mutant]()
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[ast.AST] = []
        self._lines: tuple[int, ...] = ()
        self._axes: set[ast.AST] = set()

    # Places in the text.
    def _start(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def _stop(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        return self.source[self._start(node) : self._stop(node)].decode()

    def _edit(self, kind: str, start: int, stop: int, text: str) -> None:
        first = self.source.count(b"\n", 0, start)
        last = self.source.count(b"\n", 0, stop)
        a, b = self._starts[first], self._starts[last + 1]
        place = ".".join(each.name for each in self._scope)  # type: ignore[attr-defined]
        was, becomes = self.source[a:b], self.source[a:start] + text.encode() + self.source[stop:b]
        old, new = (" ".join(each.decode().split()) for each in (was, becomes))
        self.found.append(
            Mutant(self.path, place, kind, first + 1, start, stop, text, old, new, self._lines or (first + 1,))
        )

    def _swap_node(self, kind: str, node: ast.AST, text: str) -> None:
        self._edit(kind, self._start(node), self._stop(node), text)

    def _between(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Another operator between two operands."""
        start = self._stop(left)
        words = r"\s+".join(map(re.escape, old.split()))
        match = re.search(words.encode(), self.source[start : self._start(right)])
        if match:
            self._edit(kind, start + match.start(), start + match.end(), new)

    # Statements.
    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert | ast.JoinedStr):
            return
        if isinstance(node, ast.stmt) and self._in_function():
            header = {ast.If: "test", ast.While: "test", ast.For: "iter", ast.With: "items", ast.Try: None}
            if type(node) in header:
                part = header[type(node)]
                end = node.lineno
                if part == "items":
                    end = max(each.context_expr.end_lineno or 0 for each in node.items)  # type: ignore[attr-defined]
                elif part:
                    end = getattr(node, part).end_lineno
                self._lines = tuple(range(node.lineno, end + 1))
            elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
                self._lines = tuple(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        super().visit(node)

    def _in_function(self) -> bool:
        return any(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in self._scope)

    def visit_Module(self, node: ast.Module) -> None:
        functions = [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef)]
        everything = tuple(sorted({line for each in functions for line in _body(each)}))
        for statement in node.body:
            self._lines = everything
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
                using = [each for each in functions if names & {_name(n) for n in ast.walk(each) if _is_name(n)}]
                self._lines = tuple(sorted({line for each in using for line in _body(each)})) or everything
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(_name(base) == "Protocol" for base in node.bases):
            return
        before = self._lines
        self._scope.append(node)
        functions = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        own = tuple(line for each in functions for line in _body(each)) or before
        for statement in node.body:
            self._lines = own
            self.visit(statement)
        self._scope.pop()
        self._lines = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in _TEXTS or any(_name(each) == "overload" for each in node.decorator_list):
            return
        before, self._lines = self._lines, _body(node)
        self._scope.append(node)
        for decorator in node.decorator_list:
            if _name(decorator) in _DECORATORS:
                at = self.source.rindex(b"@", 0, self._start(decorator))
                self._edit("drop", at, self._stop(decorator), "")
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()
        self._lines = before

    def visit_If(self, node: ast.If) -> None:
        if _name(node.test) == "TYPE_CHECKING" or "__name__" in self._text(node.test):
            return
        self._force(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._force(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._swap_node("branch", node.test, "False")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._swap_node("branch", test, "True")
        self.generic_visit(node)

    def _force(self, test: ast.expr) -> None:
        for text in ("True", "False"):
            self._swap_node("branch", test, text)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._swap_node("branch", node, "break")

    def visit_Break(self, node: ast.Break) -> None:
        self._swap_node("branch", node, "continue")

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is None and isinstance(item.context_expr, ast.Call):
                self._swap_node("drop", item.context_expr, '__import__("contextlib").nullcontext()')
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if not isinstance(call, ast.Call):
            if not _is_text(call):
                self.generic_visit(node)
            return
        name = _name(call)
        if name == "warn":
            self._swap_node("drop", node, "pass")
        if name in _SAID or (name == "__init__" and "super()" in self._text(call)):
            return
        self._swap_node("drop", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if self._in_function():
            function = next(each for each in reversed(self._scope) if isinstance(each, ast.FunctionDef))
            if isinstance(target, ast.Name):
                bound = target.id in _bound_before(function, node.lineno)
            else:
                bound = isinstance(target, ast.Attribute | ast.Subscript) and function.name != "__init__"
            if bound:
                self._swap_node("drop", node, "pass")
        self.visit(node.value)
        if isinstance(target, ast.Subscript):
            self.visit(target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC and not _is_text(node.value) and not isinstance(node.value, _LISTED):
            old, new = _ARITHMETIC[type(node.op)]
            for text in ("", *new[:1]):
                self._between("operator", node.target, node.value, f"{old}=", f"{text}=")
        self._swap_node("drop", node, "pass")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        value = node.value
        function = next((each for each in reversed(self._scope) if isinstance(each, ast.FunctionDef)), None)
        if value is None or function is None:
            return
        returns = ast.unparse(function.returns) if function.returns else ""
        if isinstance(value, ast.Call) and value.args and not isinstance(value.args[0], ast.Starred):
            if not isinstance(value.args[0], ast.Constant | ast.GeneratorExp) and not _is_text(value.args[0]):
                self._swap_node("return", value, f"({self._text(value.args[0])})")
        elif returns == "bool" and not isinstance(value, ast.Constant):
            self._swap_node("return", value, f"not ({self._text(value)})")
        elif "None" in returns and not (isinstance(value, ast.Constant) and value.value is None):
            self._swap_node("return", value, "None")
        self.generic_visit(node)

    # Expressions.
    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _ARITHMETIC and not self._joins(node):
            old, new = _ARITHMETIC[type(node.op)]
            for text in new:
                self._between("operator", node.left, node.right, old, text)
        self.generic_visit(node)

    def _joins(self, node: ast.BinOp) -> bool:
        """Text, lists and paths, where another operator is only a TypeError."""
        sides = [*ast.walk(node.left), *ast.walk(node.right)] if isinstance(node.op, ast.Div) else []
        folder = any(_is_text(each) for each in sides) or (
            isinstance(node.op, ast.Div) and not _FOLDERS.isdisjoint(re.split(r"\W|_", self._text(node.left)))
        )
        ends = (node.left, node.right)
        return folder or any(_is_text(each) or isinstance(each, _LISTED) for each in ends)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            old, new = _COMPARISONS[type(op)]
            self._between("comparison", left, right, old, new)
            left = right
        for part in (node.left, *node.comparators):
            if not isinstance(part, ast.Tuple | ast.Set | ast.List):
                self.visit(part)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            start = self._stop(left)
            found = re.search(rb"\b%s\b" % old.encode(), self.source[start : self._start(right)])
            if found and len(node.values) == 2:
                self._edit("boolean", start + found.start(), start + found.end(), new)
        for each in node.values:  # One condition dropped.
            self._swap_node("boolean", each, "True" if old == "and" else "False")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._swap_node("boolean", node, f"bool({self._text(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._swap_node("operator", node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if node in self._axes or value is None or value is Ellipsis:
            return
        if isinstance(value, bool):
            self._swap_node("boolean", node, str(not value))
        elif isinstance(value, int):
            others = {0: (1,), 1: (0, 2), 2: (1, 3)}.get(value, (value + 1, value - 1))
            for other in others if value < 1000 else (value * 2, value // 2):
                self._swap_node("number", node, str(other))
        elif isinstance(value, float):
            factors = (100, 1 / 100) if abs(value) <= 0.01 else (2, 0.5)
            for other in [value * each for each in factors] if value else [1.0]:
                self._swap_node("number", node, repr(float(f"{other:.12g}")))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._axis(node.slice)
        self.generic_visit(node)

    def _axis(self, node: ast.expr) -> None:
        if _is_int(node):
            value = ast.literal_eval(node)
            self._axes.update(ast.walk(node))
            self._swap_node("axis", node, str({-1: -2, -2: -1}.get(value, value ^ 1 if value >= 0 else value + 1)))

    def visit_Tuple(self, node: ast.Tuple) -> None:
        if len(node.elts) > 4 and not self._in_function():
            return  # A table, such as a data set's colours.
        if isinstance(node.ctx, ast.Load) and len(node.elts) == 2:
            self._swap_pair(*node.elts)
        self.generic_visit(node)

    def _swap_pair(self, a: ast.expr, b: ast.expr) -> None:
        alike = all(isinstance(each, _ALIKE) for each in (a, b)) or type(a) is type(b)
        if not alike or isinstance(a, ast.Starred) or _is_text(a) or ast.dump(a) == ast.dump(b):
            return
        gap = self.source[self._stop(a) : self._start(b)].decode()
        if "(" in gap or ")" in gap:
            return
        self._edit("swap", self._start(a), self._stop(b), self._text(b) + gap + self._text(a))

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node)
        if name in _SAID or name == "TypeVar":
            return
        if name in ("isinstance", "issubclass"):
            self.visit(node.args[0])
            return
        if name == "cast":
            self.visit(node.args[1])
            return
        self._unwrap(node, name)
        end = self._stop(node.func)
        if name in _OPPOSITE and (name not in _OF_TENSORS or isinstance(node.func, ast.Attribute)):
            self._edit("opposite", end - len(name), end, _OPPOSITE[name])
        if name not in _SAME_EITHER_WAY | _MUST_BE_SO and len(node.args) >= 2:
            self._swap_pair(*node.args[:2])
        if name not in _MUST_BE_SO:
            self._drop_keywords(node)
        for keyword in node.keywords:
            if keyword.arg in ("dim", "axis"):
                self._axis(keyword.value)
            if keyword.arg not in _KEYWORDS_KEPT:
                self.visit(keyword.value)
        for each in (node.func, *node.args):
            self.visit(each)

    def _unwrap(self, node: ast.Call, name: str) -> None:
        if isinstance(node.func, ast.Attribute) and name in _METHODS and _name(node.func.value) not in ("math", "F"):
            end = self.source.rindex(b".", 0, self._stop(node.func))
            inner = self.source[self._start(node) : end].decode().rstrip()
            if inner not in ("torch", "copy", "np"):
                self._swap_node("drop", node, inner)
                return
        if name in _FUNCTIONS and node.args and not isinstance(node.args[0], ast.Starred | ast.GeneratorExp):
            self._swap_node("drop", node, f"({self._text(node.args[0])})")
        if name in ("min", "max") and len(node.args) == 2 and not node.keywords:
            for each in node.args:
                if not isinstance(each, ast.Constant | ast.Starred):
                    self._swap_node("drop", node, f"({self._text(each)})")

    def _drop_keywords(self, node: ast.Call) -> None:
        items = [*node.args, *node.keywords]
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in _KEYWORDS_KEPT:
                continue
            at = items.index(keyword)
            if at:
                before = self._stop(items[at - 1])
                comma = self.source.find(b",", before, self._start(keyword))
                if comma >= 0:
                    self._edit("keyword", comma, self._stop(keyword), "")
            else:
                stop = self._start(items[1]) if len(items) > 1 else self._stop(keyword)
                self._edit("keyword", self._start(keyword), stop, "")


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute)


def _body(function: ast.FunctionDef) -> tuple[int, ...]:
    return tuple(range(function.body[0].lineno, (function.end_lineno or function.lineno) + 1))


def _bound_before(function: ast.FunctionDef, line: int) -> Iterator[str]:
    arguments = function.args
    yield from (each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    declared = {node.target for node in ast.walk(function) if isinstance(node, ast.AnnAssign) and node.value is None}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.lineno < line
            and node not in declared
        ):
            yield node.id
