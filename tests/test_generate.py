"""Text from caches: however it is computed, it is the text of greedy decoding without them."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from cases import rng

import jaxattn as ja
from jaxattn import masks

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import chat
import generate
import llama
import measure_chat
import serve
from data import DataError
from generate import NONE, Sampling, Writer, greedy
from serve import Request, Server

pytestmark = pytest.mark.usefixtures("as_users_run")

CHUNK, CAPACITY = 8, 160
Tokens = list[int]


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_models.write_llama(path, layers=1, width=32, heads=2, kv_heads=1, hidden=32, seed=5)
    return path


@pytest.fixture(scope="module")
def writer(file: Path) -> Writer:
    """With no end but a token that is not drawn, so that tests choose the lengths."""
    return Writer(llama.load(file).model, [1], chunk=CHUNK)


@pytest.fixture(scope="module")
def plain(writer: Writer) -> Any:
    """Greedy decoding by the definition: each token from the whole text before it."""

    @jax.jit
    def next_token(tokens: Any, length: Any) -> Any:
        return jnp.argmax(writer.model(tokens[None])[0, length - 1])

    def decode(prompt: Tokens, count: int) -> Tokens:
        text = list(prompt)
        for _ in range(count):
            padded = np.zeros(CAPACITY, np.int32)
            padded[: len(text)] = text
            text.append(int(next_token(padded, len(text))))
        return text[len(prompt) :]

    return decode


def prompts(*lengths: int) -> list[Tokens]:
    return [rng(89, n, i).integers(3, 260, n).tolist() for i, n in enumerate(lengths)]


def whole(writer: Writer, given: list[Tokens], limits: list[int], sampling: Any = None) -> Any:
    """Answers from a `KVCache` of each row."""
    rows = len(given)
    sampling = greedy(rows) if sampling is None else sampling
    caches = writer.model.caches(partial(ja.KVCache.create, rows, CAPACITY))
    state, first = writer.start(given, caches, limits, sampling)
    parts = [first[:, None]]
    while np.asarray(state.left).any():
        state, more = writer.advance(state, sampling, 4)
        parts.append(more)
    return [[int(t) for t in row if t != NONE] for row in np.concatenate(parts, 1)]


# --- one text and many ----------------------------------------------------------------------------


def test_tokens_are_those_of_the_definition(writer: Writer, plain: Any) -> None:
    """Prompts of several chunks and of less than one, in one batch; and without compiling again."""
    given, limits = prompts(13, 3, 8), [9, 12, 1]
    assert whole(writer, given, limits) == [plain(p, n) for p, n in zip(given, limits)]


def test_new_lengths_need_no_new_program(writer: Writer, compilations: Any) -> None:
    whole(writer, prompts(13, 3, 8), [9, 12, 1])
    whole(writer, prompts(1, 2, 3), [2, 2, 2], Sampling.of(3, 0.5, 0.9, 1))
    compilations.reset()
    whole(writer, prompts(20, 9, 1), [3, 0, 11], Sampling.of(3, 0.7, 0.5, 7))
    assert compilations.count == 0


def test_an_answer_ends(writer: Writer, plain: Any) -> None:
    """At a token that ends it, which is not shown; and a limit of 0 shows nothing."""
    (prompt,) = prompts(5)
    answer = plain(prompt, 12)
    end = answer[6]
    first = answer.index(end)
    ending = Writer(writer.model, [end], chunk=CHUNK)
    assert whole(ending, [prompt] * 3, [12, 0, 2]) == [answer[:first], [], answer[:2]]


@pytest.mark.parametrize("prompts", [[[]], [[3], []]], ids=str)
def test_an_empty_prompt_is_refused(writer: Writer, prompts: Any) -> None:
    with pytest.raises(DataError, match="an empty prompt"):
        whole(writer, prompts, [1] * len(prompts))


# --- sampling -------------------------------------------------------------------------------------


def drawn(logits: Any, temperature: float, top_p: float, count: int) -> np.ndarray:
    sampling = Sampling.of(count, temperature, top_p, seed=3)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens = generate.chosen(rows, sampling, jnp.zeros(count, jnp.int32))
    return np.bincount(tokens, minlength=len(logits)) / count


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_tokens_are_drawn_from_the_softmax(temperature: float, top_p: float) -> None:
    """Of the likeliest tokens that have this probability together."""
    logits = np.array([0.0, 2.0, -1.0, 1.5, 0.3])
    weights = np.exp(logits / temperature)
    weights /= weights.sum()
    kept, total = np.zeros(5, bool), 0.0
    for token in np.argsort(-weights):
        kept[token] = total < top_p
        total += weights[token]
    assert kept.sum() == (5 if top_p == 1 else 2)
    wanted = np.where(kept, weights, 0) / weights[kept].sum()
    found = drawn(logits, temperature, top_p, 4000)
    # Four standard deviations of each frequency.
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 4000)).all()


def test_no_temperature_takes_the_likeliest() -> None:
    assert drawn([0.0, 2.0, -1.0], 0.0, 0.1, 8)[1] == 1
    assert drawn([0.0, 2.0, -1.0], 3.0, 1e-6, 8)[1] == 1


def test_a_draw_does_not_depend_on_the_batch(writer: Writer) -> None:
    given, limits = prompts(13, 3, 8), [9, 12, 6]
    sampling = Sampling.of(3, 0.9, 0.95, seed=2)
    together = whole(writer, given, limits, sampling)
    assert together == whole(writer, given, limits, sampling)
    backwards = jax.tree.map(lambda a: a[::-1], sampling)
    assert whole(writer, given[::-1], limits[::-1], backwards) == together[::-1]
    assert together != whole(writer, given, limits, Sampling.of(3, 0.9, 0.95, seed=4))


@pytest.mark.parametrize(
    ("settings", "says"),
    [((-1.0,), "temperature -1: expected 0 or more"), ((1.0, 0.0), "top-p 0: expected"),
     ((1.0, 2.0), "top-p 2: expected")],
)  # fmt: skip
def test_what_can_not_be_sampled(settings: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Sampling.of(1, *settings)


# --- drafts ---------------------------------------------------------------------------------------


def with_drafts(
    writer: Writer, given: list[Tokens], limits: list[int], branches: int, depth: int
) -> tuple[list[Tokens], int]:
    rows = len(given)
    caches = writer.model.caches(partial(ja.KVCache.create, rows, CAPACITY))
    state, first = writer.start(given, caches, limits, greedy(rows))
    drafting = writer.drafting(given, first, CAPACITY)
    parts, passes = [first[:, None]], 0
    while np.asarray(state.left).any():
        state, drafting, more, steps = writer.advance_drafted(
            state, drafting, 2 * depth, branches=branches, depth=depth
        )
        parts.append(more)
        passes += steps
        # Drafts that were wrong leave nothing behind.
        for row, prompt in enumerate(given):
            shown = [int(t) for part in parts for t in part[row] if t != NONE]
            length = int(drafting.length[row])
            assert drafting.history[row, :length].tolist() == [*prompt, *shown]
            assert int(state.caches[0].length[row]) in (length - 1, length)
    return [[int(t) for t in row if t != NONE] for row in np.concatenate(parts, 1)], passes


@pytest.mark.parametrize(("branches", "depth"), [(1, 4), (3, 2)])
def test_drafts_change_no_token(writer: Writer, plain: Any, branches: int, depth: int) -> None:
    """Rows with drafts that are right, wrong and cut by the limit; in fewer passes than tokens."""
    given, limits = prompts(13, 3, 8), [25, 12, 5]
    answers = [plain(p, n) for p, n in zip(given, limits)]
    # A prompt that holds its own answer: its drafts are right.
    given[0] = [*given[0], *answers[0][:9], *given[0]][-30:]
    answers[0] = plain(given[0], limits[0])
    found, passes = with_drafts(writer, given, limits, branches, depth)
    assert found == answers
    assert passes < 24


def test_drafts_stop_at_an_end(writer: Writer, plain: Any) -> None:
    (prompt,) = prompts(5)
    answer = plain(prompt, 12)
    ending = Writer(writer.model, [answer[6]], chunk=CHUNK)
    found, _ = with_drafts(ending, [prompt] * 3, [12, 0, 2], 3, 2)
    assert found == [answer[: answer.index(answer[6])], [], answer[:2]]


def test_drafts_are_what_followed_before() -> None:
    """Three equal tokens count more than two, then the later occurrence."""
    text = [7, 1, 2, 3, 4, 9, 2, 3, 5, 6, 1, 2, 3]
    history = jnp.full((1, 20), NONE).at[0, : len(text)].set(jnp.asarray(text))
    found = generate.drafted(history, jnp.asarray([len(text)]), 2, 3)
    np.testing.assert_array_equal(found[0], [[4, 9, 2], [5, 6, 1]])


def test_a_tree_needs_room(writer: Writer) -> None:
    with pytest.raises(ValueError, match="most: got 4, expected more than depth=4"):
        writer.advance_drafted(None, None, 4, depth=4)  # type: ignore[arg-type]


# --- a queue --------------------------------------------------------------------------------------


def requests(*sizes: tuple[int, int]) -> list[Request]:
    return [Request(p, n) for p, (_, n) in zip(prompts(*(s for s, _ in sizes)), sizes)]


SIZES = [(13, 9), (3, 12), (8, 1), (1, 5), (20, 7), (4, 4), (9, 12)]


def served(server: Server, given: list[Request]) -> list[Tokens]:
    answers = {answer.number: answer.tokens for answer in server.run(given)}
    held = server.state.caches[0]
    kept = len(server.prefix) // server.page
    assert int(held.available) == held.key[0].shape[0] - kept
    return [answers[number] for number in range(len(given))]


@pytest.mark.parametrize("pages", [24, 9], ids=["enough pages", "one long request at a time"])
def test_requests_that_come_and_go(writer: Writer, plain: Any, pages: int) -> None:
    """Each is answered as if it were alone, and gives its pages back."""
    given = requests(*SIZES)
    server = Server(writer, 3, pages, 4, 32, burst=4)
    assert served(server, given) == [plain(list(r.prompt), r.limit) for r in given]
    assert 7 <= server.most_pages <= pages
    # The same server, and other requests.
    assert served(server, given[::-1]) == [plain(list(r.prompt), r.limit) for r in given[::-1]]


def test_a_prefix_is_computed_once_and_shared(writer: Writer, plain: Any) -> None:
    """Its pages are held once, whichever requests begin with it."""
    (prefix,) = prompts(11)
    given = [
        Request([*prefix, *r.prompt] if n % 3 else r.prompt, r.limit)
        for n, r in enumerate(requests(*SIZES))
    ]
    alone = Server(writer, 3, 30, 4, 40, burst=4)
    shared = Server(writer, 3, 30, 4, 40, prefix=prefix, burst=4)
    answers = [plain(list(r.prompt), r.limit) for r in given]
    assert served(alone, given) == served(shared, given) == answers
    assert shared.prefix == prefix[:8]
    assert shared.most_pages < alone.most_pages


def test_a_sampled_request_is_its_own(writer: Writer) -> None:
    (prompt,) = prompts(6)
    given = [Request(prompt, 8, 0.9, 0.95, seed) for seed in (0, 1, 0)]
    one, other, again = served(Server(writer, 2, 12, 4, 16, burst=4), given)
    assert one == again != other


def test_a_server_for_some_requests_shares_what_they_begin_with(writer: Writer) -> None:
    (prefix,) = prompts(9)
    given = [Request([*prefix, token], 3) for token in (5, 6, 7)]
    server = serve.server_for(writer, given, slots=2, page=4)
    assert server.prefix == prefix[:8]
    assert len(server.running) == 2
    assert serve.server_for(writer, given[:1], slots=2, page=4).prefix == []


@pytest.mark.parametrize(("pages", "longest"), [(8, 16), (3, 32)])
def test_a_request_that_never_fits_is_refused(writer: Writer, pages: int, longest: int) -> None:
    server = Server(writer, 2, pages, 4, longest)
    most = min(pages * 4, longest)
    with pytest.raises(DataError, match=f"request 1 has 14 tokens.*expected at most {most} in all"):
        list(server.run(requests((3, 2), (14, 4))))


# --- conversations --------------------------------------------------------------------------------


def said(conversation: Any, text: Tokens, limit: int, drafts: bool = False) -> Tokens:
    parts = conversation.answer(text, limit, greedy(1), drafts)
    return [token for part in parts for token in part]


@pytest.mark.parametrize("drafts", [False, True])
def test_a_conversation_goes_on_where_it_was(writer: Writer, plain: Any, drafts: bool) -> None:
    """Turn after turn, changed texts, and an answer that was stopped."""
    conversation = chat.Conversation(writer, CAPACITY)
    (text,) = prompts(9)
    for more in prompts(4, 6):
        answer = said(conversation, text, 9, drafts)
        assert answer == plain(text, 9)
        text = [*text, *answer, *more]
    stopped = conversation.answer(text, 12, greedy(1), drafts)
    assert next(stopped) == plain(text, 1)
    stopped.close()
    for other in ([*text[:12], 5, 6], text[:3], text):
        assert said(conversation, other, 5, drafts) == plain(other, 5)
    with pytest.raises(DataError, match="more than the 160 of --context"):
        said(conversation, text * 9, 9)


def test_a_conversation_with_a_window_has_no_end(writer: Writer) -> None:
    """Its tokens are those of a mask: the last 12, and the first 4."""
    conversation = chat.Conversation(writer, 16, window=12)
    (text,) = prompts(50)
    found = said(conversation, text, 8)
    mask = masks.sliding_window(12) | masks.global_tokens(generate.FIRST)
    whole_text = np.array([[*text, *found]])
    logits = writer.model(jnp.asarray(whole_text), mask=mask)[0]
    assert found == np.argmax(logits, -1)[49:57].tolist()
    # A changed beginning: a ring has forgotten the rest, and reads it again.
    changed = [text[0] + 1, *text[1:]]
    fresh = chat.Conversation(writer, 16, window=12)
    assert said(conversation, changed, 8) == said(fresh, changed, 8)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Any:
    """`chat.py` on the tiny model, with what is typed: status, output, errors."""
    # Programs are those of the other tests.
    for module in (chat, measure_chat):
        monkeypatch.setattr(module, "Writer", partial(Writer, chunk=CHUNK))

    def command(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        try:
            status = chat.main(["--model", str(file), "--out", str(tmp_path), *arguments])
        except SystemExit as error:
            status = int(str(error.code))
        return status, *capsys.readouterr()

    return command


SMALL = ("--context", str(CAPACITY), "--tokens", "12")


def test_a_prompt_is_answered(run: Any) -> None:
    status, out, err = run("--prompt", "the cat", "--temperature", "0", *SMALL)
    assert (status, err) == (0, "")
    assert "tokens of text" in out
    drafted = run("--prompt", "the cat", "--temperature", "0", "--drafts", *SMALL)
    assert drafted[1].rsplit("\n", 2)[0] == out.rsplit("\n", 2)[0]


def test_a_file_of_prompts_is_answered(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n\n12\nthe\n")
    status, out, err = run("--file", str(path), "--slots", "2", "--system", "the cat " * 9, *SMALL)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("> ")] == [
        "> the cat",
        "> 12",
        "> the",
    ]
    assert "3 answers" in out


def test_a_conversation_is_typed(run: Any) -> None:
    """Turns, an empty line, a turn that is too long, and the end of the input."""
    status, out, err = run(*SMALL, typed="the cat\n\n" + "12 " * 70 + "\nthe\n")
    assert status == 0
    assert out.count("tokens of text") == 2
    assert "more than the 160 of --context" in err
    assert err.count("\n") == 1


def test_ctrl_c_stops_an_answer_not_the_program(run: Any, monkeypatch: Any) -> None:
    @contextlib.contextmanager
    def at_once() -> Iterator[list[bool]]:
        yield [True]

    monkeypatch.setattr(chat, "interruptions", at_once)
    status, out, _ = run(*SMALL, typed="the cat\n12\n")
    assert (status, out.count("to the first of 1")) == (0, 2)
    assert run("--prompt", "the cat", *SMALL)[0] == 130


def test_heads_are_drawn(run: Any, tmp_path: Path) -> None:
    status, out, _ = run("--prompt", "the cat", "--attention", "0")
    assert status == 0
    assert (tmp_path / "attention_0.png").stat().st_size > 5000
    assert out.replace("\n", "").endswith("attention_0.png")


def test_attention_maps_are_those_of_the_model(writer: Writer) -> None:
    """Rows sum to 1 and look back; the maps of layer 0 are the definition's."""
    tokens = jnp.asarray(prompts(6, 6))
    maps = np.asarray(chat.attention_maps(writer.model, tokens, 0))
    block = writer.model.blocks[0]
    x = block.attention_norm(writer.model.embedding(tokens))
    query, key = (
        block.attention.rope(f(x), jnp.arange(6))
        for f in (block.attention.query, block.attention.key)
    )
    wanted = ja.attention_weights(query, key, mask=masks.causal())
    np.testing.assert_allclose(maps, wanted, atol=1e-6)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "a", "--file", "b"), "expected --prompt or --file, not both"),
        (("--prompt", "a", "--drafts"), "expected --temperature 0 with it"),
        (("--file", "b", "--window", "9"), "not for --file"),
        (("--prompt", "a", "--window", "0"), "--window: expected 1 or more"),
        (("--prompt", "a", "--tokens", "0"), "--tokens: expected 1 or more"),
        (("--attention", "1"), "--attention needs --prompt"),
        (("--prompt", "a", "--attention", "1"), "expected a layer from 0 to 0"),
        (("--prompt", "12" * 40, "--attention", "0"), "expected 1 to 64 for a picture"),
        (("--file", "/nowhere"), "/nowhere: no such file"),
        (("--model", "/nowhere", "--prompt", "a"), "/nowhere: no such file"),
        (("--prompt", "a", "--temperature", "-1"), "temperature -1: expected 0 or more"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(run: Any, arguments: Any, says: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


# --- measurements ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("queue", ("--requests", "3", "--slots", "1", "--longest", "9"), "3 of 3 answers"),
        ("prefix", ("--requests", "3", "--slots", "2", "--words", "20"), "the same answers: 3"),
        ("drafts", ("--tokens", "9", "--trees", "1", "3"), "repeat a text"),
        ("window", ("--tokens", "256", "--window", "64"), "the last 64 and the first 4"),
    ],
)
def test_measurements_run(
    run: Any, file: Path, monkeypatch: Any, capsys: Any, verb: str, arguments: Any, says: str
) -> None:
    """On the tiny model, with short texts: its vocabulary has no words."""
    monkeypatch.setattr(measure_chat, "passages", lambda seed: ["the cat sat " * 40] * 20)
    monkeypatch.setenv("COLUMNS", "200")
    assert chat.main([verb, "--model", str(file), *arguments]) == 0
    assert says in capsys.readouterr().out


def test_losses_from_rings_are_those_of_a_mask(writer: Writer, file: Path) -> None:
    (tokens,) = prompts(41)
    ring = partial(ja.KVCache.rolling, 1, 12, chunk=8, first=2)
    found = measure_chat.losses_of(llama.load(file), tokens, writer.model.caches(ring), 8)
    mask = masks.sliding_window(12) | masks.global_tokens(2)
    logits = writer.model(jnp.asarray([tokens[:-1]]), mask=mask)[0]
    wanted = -jax.nn.log_softmax(logits)[np.arange(40), tokens[1:]]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
