"""Inputs of runs that can't be: files that aren't there, texts that aren't JSON, JSON that doesn't fit."""

from __future__ import annotations

import json

import pytest
from tests.bad_input.bench import HANDLERS, INPUT, Case, call, check, done, put, rows

SURFACE = "input files"

FITTED = HANDLERS.replace(
    'Workflow("order", [',
    'Workflow("order", input_model=Order, steps=[',
).replace(
    "activity = ",
    "from pydantic import BaseModel, Field\nclass Order(BaseModel):\n"
    "    sku: str\n    quantity: int = Field(gt=0)\nactivity = ",
    1,
)


def dispatched(
    name: str, body: str | bytes | None, *says: str, file: str = "in.json", handlers: str = HANDLERS
) -> Case:
    """`dispatch` with `body` in a file."""
    does = ("dispatch", "order", file, "--handlers", "handlers.py", "--json")
    files = {"handlers.py": handlers, "input.json": json.dumps(INPUT)}
    return Case(name, does, says, files=files if body is None else {**files, file: body})


def piped(name: str, body: str | bytes, *says: str) -> Case:
    """`dispatch` with `body` on standard input."""
    does = ("dispatch", "order", "-", "--handlers", "handlers.py", "--json")
    return Case(name, does, ("standard input", *says), input=body)


def fitted(name: str, value: object, *says: str) -> Case:
    """An input for a workflow that has an input model."""
    return dispatched(name, json.dumps(value), "the input of workflow 'order'", *says, handlers=FITTED)


CASES = [
    dispatched(
        "missing file", None, "there is no file inptu.json", "did you mean 'input.json'", file="inptu.json"
    ),
    dispatched(
        "missing folder",
        None,
        "there is no file gone/in.json",
        "or - for standard input",
        file="gone/in.json",
    ),
    dispatched("a folder", None, ". is a folder", "expected a file with a JSON object", file="."),
    dispatched(
        "JSON instead of a file",
        None,
        "expected a file with the input, found JSON",
        "WORKFLOW -",
        file='{"sku": "A-1"}',
    ),
    dispatched("a name that no file can have", None, "can't read", "null byte", file="a\0b"),
    dispatched("a name without an end", None, "can't read", "File name too long", file="x" * 300),
    dispatched(
        "a file without an end", None, "/dev/zero is too large", "the limit is 1,048,576", file="/dev/zero"
    ),
    dispatched("empty", "", "in.json is empty", "at least {}"),
    dispatched("blanks", " \n\t", "in.json is empty"),
    dispatched("not JSON", '{"sku": "A-1",\n "quantity" 2}', "in.json is not JSON", "line 2, column 13"),
    dispatched(
        "Python instead of JSON", "{'sku': 'A-1'}", "in.json is not JSON", "double quotes", "line 1, column 2"
    ),
    dispatched("YAML instead of JSON", "sku: A-1\n", "in.json is not JSON", "line 1, column 1"),
    dispatched("two values", "{} {}", "in.json is not JSON", "Extra data", "column 4"),
    dispatched(
        "cut off", '{"sku": "A-', "in.json is not JSON", "Unterminated string starting at line 1, column 9"
    ),
    dispatched("a key twice", '{"sku": "A", "sku": "B"}', "the key 'sku' occurs twice"),
    dispatched("a key twice within", '{"sku": "A", "x": [{"a": 1, "a": 2}]}', "the key 'a' occurs twice"),
    dispatched("NaN", '{"sku": "A", "quantity": NaN}', "NaN is not JSON"),
    dispatched("infinity", '{"sku": "A", "quantity": -Infinity}', "-Infinity is not JSON"),
    dispatched("a number too large", '{"sku": "A", "quantity": 1e999}', "1e999 is not a finite number"),
    dispatched(
        "a number too long", f'{{"sku": "A", "quantity": {"9" * 5000}}}', "in.json is not JSON", "digits"
    ),
    dispatched("not UTF-8", b'{"sku": "\xff"}', "in.json is not JSON", "byte 9 is not UTF-8"),
    dispatched("UTF-16", '{"sku": "A-1"}'.encode("utf-16"), "in.json is not JSON", "byte 0 is not UTF-8"),
    dispatched("a picture", b"\x89PNG\r\n\x1a\n\x00\x00", "in.json is not JSON", "byte 0 is not UTF-8"),
    dispatched(
        "half a surrogate pair", r'{"sku": "\ud800"}', "in.json is not JSON", "half of a surrogate pair"
    ),
    dispatched("nested too deeply", '{"sku": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
    dispatched("nested without an end", "[" * 200_000, "nested deeper than 64"),
    dispatched(
        "too large",
        json.dumps({"sku": "x" * 1_100_000}),
        "in.json is too large",
        "the limit is 1,048,576",
        "max_message_bytes",
    ),
    dispatched("a list", "[1, 2]", "the input of workflow 'order' is list [1, 2]", '{"name": ...}'),
    dispatched("a text", '"A-1"', "is str 'A-1'", "expected an object"),
    dispatched("a number", "5", "is int 5", "expected an object"),
    dispatched("null", "null", "activity 'reserve' needs 'sku'", "there is: nothing"),
    dispatched(
        "a field is missing",
        '{"quantity": 2}',
        "activity 'reserve' needs 'sku'",
        "there is: quantity",
        "Put it into the input",
    ),
    dispatched("a field is misspelt", '{"SKU": "A-1"}', "activity 'reserve' needs 'sku'", "there is: SKU"),
    dispatched(
        "a field doesn't fit",
        '{"sku": "A", "quantity": "two"}',
        "'quantity' of activity 'reserve' doesn't fit",
        "valid integer",
        "'two'",
    ),
    dispatched("a field is null", '{"sku": null}', "'sku' of activity 'reserve' doesn't fit", "None"),
    fitted("a field of the model is missing", {"sku": "A"}, "doesn't fit: quantity: Field required"),
    fitted(
        "a field of the model doesn't fit",
        {"sku": "A", "quantity": 0},
        "quantity: Input should be greater than 0",
    ),
    fitted(
        "two fields of the model don't fit",
        {"quantity": "x"},
        "sku: Field required; quantity: Input should be a valid integer",
    ),
    piped("nothing in the pipe", "", "is empty"),
    piped("no JSON in the pipe", "sku=A-1", "is not JSON", "line 1, column 1"),
    piped("no text in the pipe", b"\x00\xff\x00\xff", "is not JSON", "is not UTF-8"),
    piped("a key twice in the pipe", '{"sku": "A", "sku": "B"}', "the key 'sku' occurs twice"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_input_that_cannot_be_is_refused(case: Case) -> None:
    """One line says where the input goes wrong and what is expected, and no run is recorded."""
    put(case.files)
    recorded = rows()
    check(call(*case.does, input=case.input), case.says, case.code)
    assert rows() == recorded


def test_an_input_that_was_refused_can_be_mended() -> None:
    """The id of a run that was refused is still free."""
    args = ("dispatch", "order", "in.json", "--handlers", "handlers.py", "--id", "mended")
    put({"in.json": '{"sku": '})
    assert call(*args).exit_code == 2
    put({"in.json": json.dumps(INPUT)})
    assert done(*args) == {"id": "mended"}
