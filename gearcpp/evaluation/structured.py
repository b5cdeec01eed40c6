"""What a compressed KV cache does to JSON that a model writes: calls of functions, and objects that follow a schema.

Problems come from a generator, so that no model has seen them, and from its seed alone. A prompt is a list of functions (or nothing), worked examples,
and a request; the answer is a line of JSON, written greedily and without a grammar, which would hide mistakes. Functions and examples are the same in all
prompts of a task, so a cache keeps them, packed, from one problem to the next.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.llama import Llama
from .tasks import Answer, answer

Value = str | int | float | bool | list[str]


@dataclass(frozen=True)
class Request:
    """A problem.

    Attributes:
        prompt: what stands between the examples and the answer.
        wanted: the right answer.
        schema: what an answer must follow, as in JSON Schema: of a call, of its arguments.
    """

    prompt: str
    wanted: dict[str, Any]
    schema: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A model's answer to a request.

    Attributes:
        wanted: the right answer.
        answer: what the model wrote.
        is_valid: it is a JSON object, and a call if one was asked for.
        fits: the object follows the schema; the function is the right one.
        is_right: all its values are right, but for capital letters.
    """

    wanted: dict[str, Any]
    answer: Answer
    is_valid: bool
    fits: bool
    is_right: bool


def ask(llm: Llama, prefix: str, requests: Sequence[Request], n_predict: int, judge: Callable[[Request, Answer], Judged]) -> Iterator[Judged]:
    """Have a model answer requests, one after the other.

    Args:
        prefix: what stands before every request.
        judge: `judge_call` or `judge_object`.

    Raises:
        ConfigError: a prompt and ``n_predict`` tokens do not fit into the context.
    """
    for request in requests:
        yield judge(request, answer(llm, llm.tokenize((prefix + request.prompt).encode()), n_predict, stop="\n"))


def judge_call(request: Request, written: Answer) -> Judged:
    """Whether an answer is a call of the right function with the right arguments."""
    call = read_object(written.text)
    is_call = call is not None and set(call) == {"name", "arguments"} and isinstance(call["name"], str) and isinstance(call["arguments"], dict)
    fits = bool(call and is_call and call["name"] == request.wanted["name"])
    is_right = bool(call and fits and same(call["arguments"], request.wanted["arguments"]))
    return Judged(request.wanted, written, is_call, fits, is_right)


def judge_object(request: Request, written: Answer) -> Judged:
    """Whether an answer is an object that follows the schema and has the right values."""
    found = read_object(written.text)
    fits = found is not None and follows(found, request.schema)
    return Judged(request.wanted, written, found is not None, fits, fits and same(found, request.wanted))


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that an answer is; None if it is none, or more stands beside it."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def follows(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value follows a schema of the kinds that are asked for here: objects, arrays, strings with or without an enum, numbers, booleans."""
    kind = schema["type"]
    if kind == "object":
        properties = schema["properties"]
        return isinstance(value, dict) and set(value) == set(properties) and all(follows(value[name], inner) for name, inner in properties.items())
    if kind == "array":
        return isinstance(value, list) and all(follows(one, schema["items"]) for one in value)
    if kind == "string":
        return isinstance(value, str) and value in schema.get("enum", [value])
    if kind == "boolean":
        return isinstance(value, bool)
    return isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)


def same(found: Any, wanted: Any) -> bool:
    """Whether two values are the same: words whatever their capital letters and outer spaces, numbers as numbers, true as nothing but true."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and set(found) == set(wanted) and all(same(found[name], value) for name, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(same(*pair) for pair in zip(found, wanted, strict=True))
    if isinstance(wanted, str):
        return isinstance(found, str) and found.strip().casefold() == wanted.casefold()
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    return isinstance(found, (int, float)) and found == wanted


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What requests are made of
# ---------------------------------------------------------------------------------------------------------------------------------------------

_PEOPLE = ("Anna", "Bruno", "Chiara", "David", "Emeka", "Fatima", "Goran", "Hanna", "Ivan", "Jonas", "Keiko", "Leila", "Marta", "Nils", "Olga", "Pedro")
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Vienna", "Toronto", "Hanoi", "Dublin", "Prague", "Boston", "Madrid", "Cairo", "Riga", "Perth")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ROOMS = ("kitchen", "bedroom", "office", "garage", "bathroom", "hall", "cellar", "nursery")
_COLORS = ("red", "green", "blue", "white", "black", "yellow", "grey")
_THINGS = ("lamp", "chair", "backpack", "notebook", "teapot", "umbrella", "blanket", "keyboard", "jacket", "mirror", "pencil", "bottle")
_LANGUAGES = ("French", "Spanish", "German", "Italian", "Swahili", "Korean", "Polish", "Turkish")
_MONEY = ("EUR", "USD", "JPY", "CHF", "SEK", "INR", "BRL")
_WORDS = ("river", "bread", "winter", "bridge", "mountain", "garden", "window", "candle", "market", "thunder")


@dataclass(frozen=True)
class Field:
    """A value of a request: its schema and how one is drawn."""

    schema: dict[str, Any]
    draw: Callable[[random.Random], Value]


def _word(words: Sequence[str]) -> Field:
    return Field({"type": "string"}, lambda r: r.choice(words))


def _choice(words: Sequence[str]) -> Field:
    return Field({"type": "string", "enum": list(words)}, lambda r: r.choice(words))


def _whole(least: int, most: int) -> Field:
    return Field({"type": "integer"}, lambda r: r.randint(least, most))


def _price(least: int, most: int) -> Field:
    return Field({"type": "number"}, lambda r: round(r.randint(4 * least, 4 * most - 1) / 4 + 0.05, 2))


_FLAG = Field({"type": "boolean"}, lambda r: r.random() < 0.5)


def _several(words: Sequence[str]) -> Field:
    return Field({"type": "array", "items": {"type": "string"}}, lambda r: r.sample(words, r.randint(2, 3)))


def _said(value: Value) -> str:
    """A value in a sentence."""
    if isinstance(value, list):
        return f"{', '.join(value[:-1])} and {value[-1]}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Calls of functions
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A function: what it does, its parameters, and sentences that ask for it."""

    description: str
    fields: dict[str, Field]
    sentences: tuple[str, ...]


TOOLS = {
    "set_alarm": Tool(
        "Ring at a time of the day",
        {"hour": _whole(0, 23), "minute": _whole(10, 59)},
        ("Wake me up at {hour}:{minute}.", "I have to get up at {hour}:{minute}, ring then."),
    ),
    "set_timer": Tool(
        "Ring after some minutes",
        {"minutes": _whole(2, 90)},
        ("Tell me when {minutes} minutes have passed.", "The eggs need {minutes} minutes, start counting."),
    ),
    "send_message": Tool(
        "Write to a person",
        {"to": _word(_PEOPLE), "text": _word(("I am late", "call me back", "happy birthday", "dinner is ready", "the train is gone"))},
        ('Tell {to} this: "{text}"', 'Write "{text}" to {to}.'),
    ),
    "get_weather": Tool(
        "Weather of a city on a day", {"city": _word(_CITIES), "day": _choice(_DAYS)}, ("Will it rain in {city} on {day}?", "{day} in {city}: how warm?")
    ),
    "find_train": Tool(
        "Trains between two cities",
        {"origin": _word(_CITIES[:7]), "destination": _word(_CITIES[7:]), "day": _choice(_DAYS)},
        (
            "How do I get from {origin} to {destination} by rail on {day}?",
            "I am in {origin} and have to be in {destination} on {day}. What goes on rails?",
        ),
    ),
    "book_table": Tool(
        "Reserve a table in a restaurant",
        {"guests": _whole(2, 12), "day": _choice(_DAYS), "hour": _whole(17, 22)},
        ("We are {guests} and want to eat out on {day} at {hour}.", "Dinner for {guests} on {day}, {hour} o'clock, please."),
    ),
    "convert_currency": Tool(
        "What an amount of money is in another currency",
        {"amount": _price(2, 900), "source": _choice(_MONEY[:4]), "target": _choice(_MONEY[4:])},
        ("How much is {amount} {source} in {target}?", "I have {amount} {source}; what do I get in {target}?"),
    ),
    "order_item": Tool(
        "Buy something",
        {"item": _word(_THINGS), "quantity": _whole(1, 20), "color": _choice(_COLORS)},
        ("Get me {quantity} of the {item}, in {color}.", "We need the {color} {item}, {quantity} times."),
    ),
    "translate": Tool(
        "Say a word in another language",
        {"word": _word(_WORDS), "language": _choice(_LANGUAGES)},
        ('What is "{word}" in {language}?', 'How do they say "{word}" in {language}?'),
    ),
    "set_temperature": Tool(
        "Heat or cool a room",
        {"room": _choice(_ROOMS), "degrees": _whole(15, 26)},
        ("Make it {degrees} degrees in the {room}.", "The {room} should have {degrees} degrees."),
    ),
    "switch_light": Tool(
        "Turn the light of a room on (true) or off (false)",
        {"room": _choice(_ROOMS), "on": _FLAG},
        ("The light in the {room}: {on:on/off}.", "Turn {on:on/off} the light in the {room}."),
    ),
    "log_expense": Tool(
        "Write down what was spent",
        {"amount": _price(1, 300), "category": _choice(("food", "travel", "rent", "books", "health"))},
        ("I spent {amount} on {category}.", "Note {amount} for {category}."),
    ),
}


class _Said:
    """A value that a sentence names; a flag in the words of the sentence, as {on:on/off}."""

    def __init__(self, value: Value) -> None:
        self.value = value

    def __format__(self, words: str) -> str:
        return words.split("/")[0 if self.value else 1] if words else _said(self.value)


def _call(name: str, r: random.Random) -> Request:
    tool = TOOLS[name]
    values = {field: what.draw(r) for field, what in tool.fields.items()}
    sentence = r.choice(tool.sentences).format(**{field: _Said(value) for field, value in values.items()})
    schema = {"type": "object", "properties": {field: what.schema for field, what in tool.fields.items()}}
    return Request(f"Request: {sentence}\nCall:", {"name": name, "arguments": values}, schema)


def call_requests(n: int, seed: int = 1) -> list[Request]:
    """Requests for all functions in turn, in a random order; the first ones of a longer list with the same seed are the same."""
    r = random.Random(seed)
    requests: list[Request] = []
    while len(requests) < n:
        requests += [_call(name, r) for name in r.sample(sorted(TOOLS), len(TOOLS))]
    return requests[:n]


def call_prefix() -> str:
    """The functions, and three examples, whatever the seed of the requests."""
    r = random.Random("examples")
    lines = []
    for name, tool in TOOLS.items():
        parameters = {field: what.schema.get("enum", what.schema["type"]) for field, what in tool.fields.items()}
        lines.append(json.dumps({"name": name, "description": tool.description, "parameters": parameters}))
    examples = [_call(name, r) for name in ("translate", "order_item", "switch_light")]
    return "Functions:\n" + "\n".join(lines) + "\n\nEach request is answered with the call of one function.\n\n" + "".join(map(_worked, examples))


def _worked(example: Request) -> str:
    return f"{example.prompt} {json.dumps(example.wanted)}\n\n"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Objects that follow a schema
# ---------------------------------------------------------------------------------------------------------------------------------------------

# Of each kind of thing its fields, and a sentence that says what each is.
KINDS: dict[str, dict[str, tuple[Field, str]]] = {
    "flat": {
        "city": (_word(_CITIES), "It is in {0}."),
        "rooms": (_whole(1, 9), "There are {0} rooms."),
        "rent": (_price(300, 3000), "The rent is {0} a month."),
        "furnished": (_FLAG, "It is {0:furnished/not furnished}."),
        "floor": (_whole(1, 30), "It is on floor {0}."),
        "owner": (_word(_PEOPLE), "It belongs to {0}."),
    },
    "employee": {
        "name": (_word(_PEOPLE), "This is {0}."),
        "age": (_whole(18, 66), "The age is {0}."),
        "office": (_word(_CITIES), "The place of work is {0}."),
        "languages": (_several(_LANGUAGES), "What can be spoken is {0}."),
        "level": (_choice(("junior", "senior", "lead")), "The level is {0}."),
        "remote": (_FLAG, "Work is {0:done from home/not done from home}."),
    },
    "product": {
        "item": (_word(_THINGS), "This is a {0}."),
        "color": (_choice(_COLORS), "It is {0}."),
        "price": (_price(3, 400), "It costs {0}."),
        "stock": (_whole(0, 500), "We have {0} of them."),
        "returnable": (_FLAG, "It {0:can/cannot} be returned."),
        "warehouses": (_several(_CITIES), "It is kept in {0}."),
    },
    "course": {
        "subject": (_word(("algebra", "pottery", "chess", "botany", "welding", "singing")), "The course is about {0}."),
        "teacher": (_word(_PEOPLE), "{0} teaches it."),
        "days": (_several(_DAYS), "It is held on {0}."),
        "seats": (_whole(5, 60), "It has {0} seats."),
        "fee": (_price(10, 500), "It costs {0}."),
        "online": (_FLAG, "It is {0:held online/not held online}."),
    },
}


def _object(kind: str, r: random.Random) -> Request:
    chosen = r.sample(sorted(KINDS[kind]), r.randint(3, 5))
    values = {name: KINDS[kind][name][0].draw(r) for name in chosen}
    said = r.sample(chosen, len(chosen))
    text = " ".join(KINDS[kind][name][1].format(_Said(values[name])) for name in said)
    schema = {"type": "object", "properties": {name: KINDS[kind][name][0].schema for name in chosen}, "required": chosen}
    return Request(f"Schema: {json.dumps(schema)}\nText: {text}\nObject:", values, schema)


def object_requests(n: int, seed: int = 1) -> list[Request]:
    """Schemas and texts, of all kinds in turn; the first ones of a longer list with the same seed are the same."""
    r = random.Random(seed)
    return [_object(tuple(KINDS)[i % len(KINDS)], r) for i in range(n)]


def object_prefix() -> str:
    """Four examples, one of each kind of thing, whatever the seed of the requests."""
    r = random.Random("examples")
    return "Each text is written as an object that follows the schema.\n\n" + "".join(_worked(_object(kind, r)) for kind in KINDS)
