"""Prompts against brute force: what goes in comes out, once, in a known order, or is refused in words."""

from array import array
from collections import Counter, UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.batch import Group
from fpwap.errors import DatasetError, FpwapError
from fpwap.prompts import Batching, Prompts, TokenTable, arrange, ingest

VOCAB = 100
PAD = 7

property_test = settings(max_examples=40, deadline=None)
lists_of_ids = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=30)
budgets = st.integers(1, 40)


def read(dataset: Any, **changed: Any) -> Prompts:
    options: dict[str, Any] = {
        "vocab": VOCAB,
        "seq_len": None,
        "max_positions": None,
        "truncation": "error",
        "keep_metadata": True,
        "keep_padding": True,
    }
    return ingest(dataset, **options | changed)


def table(prompts: Prompts, batching: Batching = "packed", *, tokens: int = 16, size: int = 3) -> TokenTable:
    return arrange(prompts, batching=batching, microbatch_tokens=tokens, microbatch_size=size, pad_token_id=PAD)


def back(prompts: Prompts) -> list[list[int]]:
    return [prompts.tokens(i).tolist() for i in range(prompts.n)]


def partition(arranged: TokenTable) -> list[list[tuple[int, int]]]:
    return [[(group.length, group.prompts) for group in microbatch.groups] for microbatch in arranged.microbatches]


def shown(arranged: TokenTable) -> Iterator[tuple[int, list[int], list[int]]]:
    """Every (sample id, its rows in the table, their positions) that some callback is to see."""
    for microbatch in arranged.microbatches:
        every = torch.arange(arranged.rows)[microbatch.rows]
        for view in microbatch.views:
            assert view.sample_ids.dtype == torch.int64 and view.sample_ids.device.type == "cpu"
            rows = every[view.rows].reshape(-1, view.length)
            assert len(rows) == len(view.sample_ids) > 0
            for sample_id, own in zip(view.sample_ids.tolist(), rows.tolist(), strict=True):
                yield sample_id, own, arranged.positions[own].tolist()


def right_padded(rows: list[list[int]], width: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": row + [PAD] * (width - len(row)), "attention_mask": [1] * len(row) + [0] * (width - len(row))}
        for row in rows
    ]


# --- ingest: what is accepted ---------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "one row": lambda ids: [ids],
    "int64 array": np.array,
    "uint16 array": lambda ids: np.array(ids, dtype=np.uint16),
    "array [1, S]": lambda ids: np.array([ids]),
    "strided array": lambda ids: np.repeat(np.array(ids), 2)[::2],
    "tensor": torch.tensor,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "tensor [1, S]": lambda ids: torch.tensor([ids]),
    "list of one tensor": lambda ids: [torch.tensor(ids)],
    "list of numpy scalars": lambda ids: list(np.array(ids)),
    "list of tensor scalars": lambda ids: list(torch.tensor(ids)),
    "mixed integers": lambda ids: [ids[0], *np.array(ids[1:], dtype=np.int64)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@property_test
@given(rows=lists_of_ids)
def test_every_form_of_ids_and_masks_comes_back(form: Callable[[list[int]], Any], rows: list[list[int]]) -> None:
    bare = read(form(row) for row in rows)
    dicts = read({"input_ids": form(row), "n": len(row)} for row in rows)
    masked = read(
        {"input_ids": form([0, *row, 1, 2]), "attention_mask": form([0, *[1] * len(row), 0, 0])} for row in rows
    )
    for prompts in (bare, dicts, masked):
        assert back(prompts) == rows
        assert prompts.ids.dtype == np.int32 and prompts.offsets.dtype == prompts.lengths.dtype == np.int64
        assert (prompts.n, prompts.total_tokens) == (len(rows), sum(map(len, rows)))
        assert prompts.lengths.tolist() == [len(row) for row in rows]
    assert bare.metadata == masked.metadata == [{}] * len(rows)
    assert dicts.metadata == [{"n": len(row)} for row in rows]
    assert bare.digest() == dicts.digest() != masked.digest()


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_rows_of_a_hugging_face_dataset(format: str | None) -> None:
    columns = {"input_ids": [[5, 6, 0], [7, 8, 9]], "attention_mask": [[1, 1, 0], [1, 1, 1]], "label": ["a", "b"]}
    dataset = datasets.Dataset.from_dict(columns).with_format(format)
    for samples in (dataset, dataset.to_iterable_dataset()):
        prompts = read(samples)
        assert back(prompts) == [[5, 6], [7, 8, 9]]
        assert prompts.metadata == [{"label": "a"}, {"label": "b"}]


@pytest.mark.parametrize("batch", [torch.tensor([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]]), UserDict])
def test_a_matrix_is_a_dataset_and_any_mapping_a_sample(batch: Any) -> None:
    dataset = [UserDict(input_ids=[1, 2]), UserDict(input_ids=[3, 4])] if batch is UserDict else batch
    assert back(read(dataset)) == [[1, 2], [3, 4]]


def test_any_sequence_of_integers_is_a_prompt() -> None:
    assert back(read([range(3), deque([4, 5]), array("H", [6])])) == [[0, 1, 2], [4, 5], [6]]


@pytest.mark.parametrize("flags", [[False, True, True], np.array([0, 1, 1]), torch.tensor([[False, True, True]])])
def test_masks_may_hold_bools(flags: Any) -> None:
    assert back(read([{"input_ids": [1, 2, 3], "attention_mask": flags}])) == [[2, 3]]


def test_no_mask_may_be_said_with_none() -> None:
    assert back(read([{"input_ids": [1, 2, 3], "attention_mask": None}])) == [[1, 2, 3]]


def test_a_dataset_is_iterated_exactly_once() -> None:
    asked: list[str] = []

    class OneShot:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            asked.append("iter")
            for label in "ab":
                asked.append(label)
                yield {"input_ids": [1], "label": label}

    prompts = read(OneShot())
    table(prompts), table(prompts, "padded")
    assert asked == ["iter", "a", "b"]
    assert prompts.metadata == [{"label": "a"}, {"label": "b"}]


def test_what_nobody_wants_is_not_kept() -> None:
    prompts = read([{"input_ids": [1], "text": "x" * 1000}], keep_metadata=False, keep_padding=False)
    assert prompts.metadata is None and prompts.given is None


@property_test
@given(
    rows=lists_of_ids,
    seq_len=st.integers(1, 12),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    at_left=st.booleans(),
)
def test_truncation_counts_real_tokens(
    rows: list[list[int]], seq_len: int, left: int, right: int, at_left: bool
) -> None:
    dataset = [
        {"input_ids": [0] * left + row + [0] * right, "attention_mask": [0] * left + [1] * len(row) + [0] * right}
        for row in rows
    ]
    prompts = read(dataset, seq_len=seq_len, truncation="left" if at_left else "right")
    assert back(prompts) == [row[-seq_len:] if at_left else row[:seq_len] for row in rows]
    if max(map(len, rows)) <= seq_len:
        assert prompts.digest() == read(dataset).digest()


def test_ids_at_pads_matter_only_where_they_are_kept() -> None:
    dataset = [{"input_ids": [-100, 1, 2, VOCAB], "attention_mask": [0, 1, 1, 0]}]
    assert back(read(dataset, keep_padding=False)) == [[1, 2]]
    with pytest.raises(DatasetError, match=r"sample 0: input_ids\[0\] is -100"):
        read(dataset)


def test_the_digest_tells_apart_what_has_other_bits() -> None:
    said = [
        read([[1, 2, 3], [4]]),
        read([[1, 2], [3, 4]]),
        read([[1, 2, 3], [5]]),
        read([[4], [1, 2, 3]]),
        read([[1, 2, 3, 4]]),
        read(right_padded([[1, 2, 3], [4]], 4)),
        read(right_padded([[1, 2, 3], [4]], 5)),
    ]
    assert len({prompts.digest() for prompts in said}) == len(said)
    labelled = read([{"input_ids": [1, 2, 3], "label": 1}, {"input_ids": [4]}])
    assert labelled.digest() == said[0].digest()
    plain = [read(rows, keep_padding=False) for rows in ([[1, 2, 3], [4]], right_padded([[1, 2, 3], [4]], 4))]
    assert plain[0].digest() == plain[1].digest()
    assert len(plain[0].digest()) == 32


# --- ingest: what is refused ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "bool": ([1, True], r"input_ids\[1\] is True \(type bool\)"),
    "float": ([1.0, 2.0], r"input_ids\[0\] is 1\.0 \(type float\)"),
    "None": ([1, None], r"input_ids\[1\] is None"),
    "strings": (["a", "b"], r"input_ids\[0\] is 'a'"),
    "bool array": (np.array([True, False]), r"input_ids\[0\] is True"),
    "float array": (np.array([0.0, 1.0]), r"input_ids\[0\] is 0\.0"),
    "bf16 tensor": (torch.ones(3, dtype=torch.bfloat16), r"input_ids\[0\] is 1\.0"),
    "bool tensor": (torch.ones(3, dtype=torch.bool), r"input_ids\[0\] is True"),
    "negative": ([1, 2, -1], r"input_ids\[2\] is -1, but the model's ids are 0 to 99"),
    "vocab": ([VOCAB], r"input_ids\[0\] is 100, but the model's ids are 0 to 99.*tokenizer"),
    "beyond int32": ([2**40], r"input_ids\[0\] is 1099511627776"),
    "beyond int64": ([2**70], r"input_ids\[0\] is 1180591620717411303424"),
    "uint64": (np.array([2**63 + 1], dtype=np.uint64), r"input_ids\[0\] is 9223372036854775809"),
    "empty": ([], r"input_ids is empty"),
    "empty array": (np.array([]), r"input_ids is empty"),
    "empty row": (torch.empty(1, 0, dtype=torch.int64), r"input_ids is empty"),
    "two rows": (np.array([[1, 2], [3, 4]]), r"input_ids is nested, with 2 rows; pass each as a sample"),
    "two tensors": ([torch.tensor([1]), torch.tensor([2])], r"input_ids is nested, with 2 rows"),
    "three dimensions": (torch.ones(1, 1, 3, dtype=torch.int64), r"input_ids is nested"),
    "text": ("some text", r"input_ids is text, not token ids; tokenise first.*fpwap\[text\]"),
    "text in a list": (["some text"], r"input_ids is text, not token ids; tokenise first.*fpwap\[text\]"),
    "bytes": (b"abc", r"input_ids is text"),
    "number": (5, r"input_ids is 5 \(type int\).*in a list"),
    "scalar tensor": (torch.tensor(5), r"input_ids is 5 \(type int\).*in a list"),
    "set": ({1, 2}, r"input_ids is \{1, 2\} \(type set\)"),
    "only text": ({"text": "hello"}, r"sample 1 has no 'input_ids', its keys are \['text'\]; tokenise first"),
    "no ids": ({"input_ids": None}, r"input_ids is None"),
}


@pytest.mark.parametrize("keep_padding", [True, False])
@pytest.mark.parametrize(("sample", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_sample_is_named(sample: Any, message: str, keep_padding: bool) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read(iter([[1], sample, [2]]), keep_padding=keep_padding)
    assert str(caught.value).startswith("sample 1")
    if not isinstance(sample, Mapping):
        with pytest.raises(DatasetError, match=message):
            read([[1], {"input_ids": sample, "label": 0}], keep_padding=keep_padding)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 1], "length 2, input_ids has 3"),
        ([[1, 1, 1, 1]], "length 4, input_ids has 3"),
        ([1, 0, 1], "hole"),
        ([0, 0, 0], "zero everywhere"),
        ([], "empty"),
        ([1, 2, 1], "holds 2; it must hold 0 and 1 only"),
        ([1, -1, 1], "holds -1"),
        ([1, 256, 1], "holds 256"),
        ([1.0, 1.0, 1.0], r"attention_mask\[0\] is 1\.0 \(type float\)"),
        (np.ones((3, 3), dtype=np.int64), "nested, with 3 rows"),
        ("111", "text"),
        (1, r"is 1 \(type int\)"),
    ],
)
def test_a_wrong_mask_is_named(mask: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=f"^sample 1: attention_mask.* {message}|^sample 1: {message}"):
        read([[1], {"input_ids": [1, 2, 3], "attention_mask": mask}])


def test_prompts_beyond_seq_len_are_counted() -> None:
    with pytest.raises(
        DatasetError, match=r"2 of 4 samples .* more than 3 tokens \(seq_len=3\).* sample 1 with 4"
    ) as e:
        read(([1] * n for n in (3, 4, 2, 9)), seq_len=3)
    assert "the longest has 9" in str(e.value) and "truncation='left'" in str(e.value)
    assert isinstance(e.value, FpwapError) and isinstance(e.value, ValueError)
    assert read(right_padded([[1, 2, 3]], 9), seq_len=3).n == 1  # pads are no tokens


@pytest.mark.parametrize("truncation", ["error", "left", "right"])
def test_prompts_beyond_the_models_positions_are_refused(truncation: str) -> None:
    with pytest.raises(DatasetError, match=r"1 of 2 samples .* 4 tokens .*positions.* sample 1 with 5.* seq_len=4"):
        read([[1] * 4, [1] * 5], max_positions=4, truncation=truncation)
    if truncation != "error":
        assert read([[1] * 4, [1] * 5], max_positions=4, truncation=truncation, seq_len=4).n == 2


@pytest.mark.parametrize("dataset", [[], iter(()), np.empty((0, 3), dtype=np.int64)])
def test_an_empty_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(DatasetError, match="empty"):
        read(dataset)


@pytest.mark.parametrize("dataset", [{"input_ids": [[1, 2]]}, UserDict(train=[[1]]), "text", b"text", 5, None])
def test_what_is_no_iterable_of_prompts_is_refused(dataset: Any) -> None:
    with pytest.raises(DatasetError, match=r"the dataset is .*; pass an iterable of prompts"):
        read(dataset)


# --- packed ---------------------------------------------------------------------------------------------------------


@property_test
@given(rows=lists_of_ids, budget=budgets)
def test_packed_shows_every_token_once_at_its_place(rows: list[list[int]], budget: int) -> None:
    arranged = table(read(rows), tokens=budget)
    seen = list(shown(arranged))
    assert sorted(sample_id for sample_id, _, _ in seen) == list(range(len(rows)))
    assert sorted(row for _, own, _ in seen for row in own) == list(range(arranged.rows))
    for sample_id, own, positions in seen:
        assert arranged.ids[own].tolist() == rows[sample_id]
        assert positions == list(range(len(rows[sample_id])))
    order = [(-len(rows[sample_id]), sample_id) for sample_id, _, _ in seen]
    for length in {len(row) for row in rows}:
        equal = [place for place in order if place[0] == -length]
        assert equal == sorted(equal), "equal lengths stay in input order"


@property_test
@given(rows=lists_of_ids, budget=budgets)
def test_packed_groups_are_contiguous_and_budgets_kept(rows: list[list[int]], budget: int) -> None:
    microbatches = table(read(rows), tokens=budget).microbatches
    end = 0
    for index, microbatch in enumerate(microbatches):
        assert microbatch.index == index and microbatch.rows.start == end
        end, start = microbatch.rows.stop, 0
        for group, view in zip(microbatch.groups, microbatch.views, strict=True):
            assert group == Group(start, len(view.sample_ids), view.length, longest=view.length)
            assert view.rows == group.rows
            start = group.rows.stop
        assert start == end - microbatch.rows.start
        lengths = [group.length for group in microbatch.groups]
        assert lengths == sorted(set(lengths), reverse=True)
        assert start <= budget or [group.prompts for group in microbatch.groups] == [1]
        waiting = [group.length for later in microbatches[index + 1 :] for group in later.groups]
        assert not waiting or start + min(waiting) > budget, "no prompt that fits is left for later"
        assert max(waiting, default=0) <= lengths[0], "longest first"
    assert end == sum(map(len, rows))


@property_test
@given(data=st.data(), rows=lists_of_ids, budget=budgets)
def test_the_partition_depends_on_lengths_alone(data: st.DataObject, rows: list[list[int]], budget: int) -> None:
    shuffled = data.draw(st.permutations(rows))
    others = right_padded([[0] * len(row) for row in shuffled], 15)
    assert partition(table(read(rows), tokens=budget)) == partition(table(read(others), tokens=budget))


def test_ragged_prompts_fill_their_microbatches() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(110), 0.6, 256).clip(16, 512).astype(int)
    arranged = table(read([0] * length for length in lengths), tokens=4096)
    *full, _ = (microbatch.rows.stop - microbatch.rows.start for microbatch in arranged.microbatches)
    assert len(full) + 1 == -(-arranged.rows // 4096), "as few microbatches as there can be"
    assert min(full) > 0.98 * 4096


# --- padded ---------------------------------------------------------------------------------------------------------


@st.composite
def padded_samples(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows that often, but not always, agree in width and in having a mask."""
    widths = st.sampled_from(draw(st.lists(st.integers(4, 8), min_size=1, max_size=2)))
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=(width := draw(widths)), max_size=width))
        left, right = sorted((draw(st.integers(0, width)), draw(st.integers(0, width))))
        mask = [int(left <= place < right) for place in range(width)] if left < right else [1] * width
        bare = draw(st.integers(0, 9)) == 0
        samples.append({"input_ids": ids} if bare else {"input_ids": ids, "attention_mask": mask})
    return samples


def rectangle(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and mask ``[b, width]`` with which HF would be called on these rows."""
    if all("attention_mask" in sample for sample in samples) and len({len(s["input_ids"]) for s in samples}) == 1:
        rows = [(sample["input_ids"], sample["attention_mask"]) for sample in samples]
    else:
        every = [(sample["input_ids"], sample.get("attention_mask", [1] * 8)) for sample in samples]
        real = [[entry for entry, one in zip(ids, mask, strict=False) if one] for ids, mask in every]
        longest = max(map(len, real))
        rows = [(r + [PAD] * (longest - len(r)), [1] * len(r) + [0] * (longest - len(r))) for r in real]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([mask for _, mask in rows])


@property_test
@given(samples=padded_samples(), size=st.integers(1, 5))
def test_padded_is_what_hf_would_be_called_with(samples: list[dict[str, Any]], size: int) -> None:
    arranged = table(read(samples), "padded", size=size)
    chunks = [samples[first : first + size] for first in range(0, len(samples), size)]
    end = 0
    for index, (microbatch, chunk) in enumerate(zip(arranged.microbatches, chunks, strict=True)):
        ids, mask = rectangle(chunk)
        assert microbatch.index == index and microbatch.rows.start == end
        end = microbatch.rows.stop
        batch = arranged.batch(microbatch, device=torch.device("cpu"), height=None, attention="eager", shared={})
        (group,) = batch.groups
        assert torch.equal(group.sequences(batch.ids), ids)
        assert torch.equal(group.sequences(batch.positions), (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1))
        assert (group.start, group.prompts, group.length) == (0, *ids.shape)
        assert group.longest == int(mask.sum(-1).max())
        if mask.all():
            assert group.mask is None
        else:
            assert group.mask is not None and torch.equal(group.mask, mask.bool())
    assert end == arranged.rows


@property_test
@given(samples=padded_samples(), size=st.integers(1, 5))
def test_padded_shows_every_real_token_once(samples: list[dict[str, Any]], size: int) -> None:
    prompts = read(samples)
    arranged = table(prompts, "padded", size=size)
    seen = list(shown(arranged))
    assert sorted(sample_id for sample_id, _, _ in seen) == list(range(len(samples)))
    assert all(count == 1 for count in Counter(row for _, own, _ in seen for row in own).values())
    for sample_id, own, positions in seen:
        assert arranged.ids[own].tolist() == prompts.tokens(sample_id).tolist()
        assert positions == list(range(len(own)))
    for first, microbatch in zip(range(0, len(samples), size), arranged.microbatches, strict=True):
        lengths = prompts.lengths[first : first + size].tolist()
        assert [view.length for view in microbatch.views] == list(dict.fromkeys(lengths))
        for view in microbatch.views:
            assert isinstance(view.rows, torch.Tensor) and view.rows.dtype == torch.int64
            assert view.sample_ids.tolist() == [first + i for i, n in enumerate(lengths) if n == view.length]


def test_a_truncated_row_is_padded_anew() -> None:
    rows = [[1, 2, 3], [4]]
    kept, cut = (
        table(read(right_padded(rows, 6), seq_len=seq_len, truncation="right"), "padded") for seq_len in (3, 2)
    )
    assert kept.ids.tolist() == [1, 2, 3, PAD, PAD, PAD, 4, PAD, PAD, PAD, PAD, PAD]
    assert cut.ids.tolist() == [1, 2, 4, PAD]


# --- batches --------------------------------------------------------------------------------------------------------


@property_test
@given(rows=lists_of_ids, budget=budgets, height=st.integers(1, 20))
def test_a_batch_is_filled_up_to_whole_tiles(rows: list[list[int]], budget: int, height: int) -> None:
    arranged = table(read(rows), tokens=budget)
    shared: dict[Any, object] = {}
    for microbatch in arranged.microbatches:
        batch = arranged.batch(microbatch, device=torch.device("cpu"), height=height, attention="sdpa", shared=shared)
        assert batch.shared is shared and (batch.height, batch.attention) == (height, "sdpa")
        assert batch.groups == microbatch.groups and len(batch.ids) - batch.tokens < height
        for column, source in ((batch.ids, arranged.ids), (batch.positions, arranged.positions)):
            assert column.dtype == torch.int64 and len(column) % height == 0
            assert column[: batch.tokens].tolist() == source[microbatch.rows].tolist()
            assert not column[batch.tokens :].any()


def test_masks_go_to_the_device_with_the_batch() -> None:
    arranged = table(read([[1], [2, 3]]), "padded")
    batch = arranged.batch(
        arranged.microbatches[0], device=torch.device("meta"), height=None, attention="sdpa", shared={}
    )
    assert batch.groups[0].mask is not None and batch.groups[0].mask.device.type == "meta"
    assert batch.ids.device.type == batch.positions.device.type == "meta"


# --- ids that occur -------------------------------------------------------------------------------------------------


@property_test
@given(rows=lists_of_ids, budget=budgets, vocab=st.integers(VOCAB, 4 * VOCAB), part=st.integers(1, 50))
def test_a_compact_table_names_the_same_tokens(rows: list[list[int]], budget: int, vocab: int, part: int) -> None:
    arranged = table(read(rows), tokens=budget)
    occurring = sorted({token for row in rows for token in row})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpwap.prompts.PART", part)
        made = arranged.compact(vocab)
    if 2 * len(occurring) > vocab:
        assert made is None
        return
    assert made is not None
    compact, used = made
    assert used.dtype == np.int64 and used.tolist() == occurring
    assert compact.ids.dtype == np.int32 and used[compact.ids].tolist() == arranged.ids.tolist()
    assert compact.positions is arranged.positions and compact.microbatches is arranged.microbatches


def test_half_of_the_vocabulary_is_still_compact() -> None:
    half = table(read([list(range(0, VOCAB, 2))]))
    assert half.compact(VOCAB) is not None and half.compact(VOCAB - 1) is None


def test_pads_are_ids_that_occur() -> None:
    made = table(read([[1, 2, 3], [90]]), "padded").compact(VOCAB)
    assert made is not None and made[1].tolist() == [1, 2, 3, PAD, 90]
