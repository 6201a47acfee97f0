"""The API in the hands of OpenAI's own client and of a plain one: answers, memories, errors, metrics."""

import asyncio
import hashlib
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
import torch

from hsa_ultralong.inference import Library, ask, memorize
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.serve.limits import ServeError
from hsa_ultralong.serve.memory_folders import bytes_of, held_upload, remove_uploads
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FERRY, FILLER, LANTERN, answering, serving

QUESTION = "What is the secret code of the silver lantern?"
PROMPT = f"Question: {QUESTION}\nAnswer:"


@pytest.fixture(scope="module")
def lib(server):
    """A memory that holds two facts in two documents."""
    documents = [{"name": "a", "text": FILLER + LANTERN + " " + FILLER}, {"name": "b", "text": FERRY + " " + FILLER}]
    made = httpx.post(server[0] + "/v1/memories", json={"id": "lib", "documents": documents}, timeout=HANG_SECONDS)
    assert made.status_code == 201, made.text
    assert made.json()["status"] == "ready" and made.json()["documents"] == 2
    return documents


def asked(nano, texts, prompt):
    """By the library, from a memory of its own."""
    model, tokenizer = nano
    memory = memorize(model, [torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    return ask(model, tokenizer, memory, prompt)


def asked_there(server, id, prompt):
    """By the library, from the memory as the server opens it."""
    answers = server[1]
    return ask(answers.model, answers.tokenizer, answers.memories.open("default", [id]).memory, prompt)


def test_a_completion_with_a_memory_equals_ask(openai_client, server, lib):
    expected = asked_there(server, "lib", PROMPT)
    found = openai_client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=24, stop="\n", extra_body={"memory": "lib", "sources": 3}
    )
    assert found.choices[0].text == expected.text and "4821937" in expected.text
    retrieval = found.choices[0].model_extra["retrieval"]
    assert retrieval["weight"] == pytest.approx(expected.weight, abs=1e-5)
    assert retrieval["is_uncertain"] == expected.is_uncertain
    assert [one["start"] for one in retrieval["sources"]] == [one.start for one in expected.sources]
    assert retrieval["sources"][0]["memory"] == "lib" and any("lantern" in one["text"] for one in retrieval["sources"])
    assert found.usage.completion_tokens == len(expected.tokens)


def test_passages_in_the_prompt_are_those_of_ask_and_are_named(openai_client, client, server, lib):
    answers = server[1]
    memory = answers.memories.open("default", ["lib"]).memory
    expected = ask(answers.model, answers.tokenizer, memory, PROMPT, reread=2)
    options = {"model": "nano", "prompt": PROMPT, "max_tokens": 24, "stop": "\n"}
    found = openai_client.completions.create(**options, extra_body={"memory": "lib", "reread": 2})
    assert found.choices[0].text == expected.text
    retrieval = found.choices[0].model_extra["retrieval"]
    assert [(one["name"], one["start"]) for one in retrieval["reread"]] == [
        (one.name, one.start) for one in expected.reread
    ]
    assert retrieval["weight"] == pytest.approx(expected.weight, abs=1e-5) and retrieval["sources"] == []
    bare = len(answers.tokenizer(PROMPT)["input_ids"])
    assert bare + 64 < found.usage.prompt_tokens < bare + 3 * 64
    # less room, fewer passages; and no room is said
    body = {**options, "memory": "lib", "reread": 2}
    fewer = client.post("/v1/completions", json={**body, "reread_tokens": 80}).json()["choices"][0]["retrieval"]
    assert len(fewer["reread"]) == 1
    for changes, words in (({"reread_tokens": 5}, "does not fit"), ({"prompt": [5, 6]}, "needs a prompt in text")):
        refused = client.post("/v1/completions", json={**body, **changes})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_a_chat_message_is_asked_as_the_command_asks_it(openai_client, server, lib):
    expected = asked_there(server, "lib", PROMPT)
    found = openai_client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": QUESTION}], extra_body={"memory": ["lib"]}
    )
    assert found.choices[0].message.content == expected.text and found.choices[0].finish_reason == "stop"


def test_fields_that_ask_for_nothing_are_accepted(client):
    body = {"model": "nano", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    for asked in (
        {"tools": [], "tool_choice": "auto"}, {"tools": None, "tool_choice": "none"}, {"tool_choice": "auto"},
        {"functions": [], "function_call": "auto"}, {"reasoning_effort": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {}, "presence_penalty": 0},
    ):  # fmt: skip
        assert client.post("/v1/chat/completions", json={**body, **asked}).status_code == 200, asked


def test_a_stream_is_the_same_answer_in_pieces(openai_client, lib):
    options = {"model": "nano", "prompt": PROMPT, "max_tokens": 24, "extra_body": {"memory": "lib", "sources": 1}}
    whole = openai_client.completions.create(**options)
    events = list(openai_client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-2].choices[0].model_extra["retrieval"] == whole.choices[0].model_extra["retrieval"]
    chat = openai_client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": QUESTION}], stream=True, extra_body={"memory": "lib"}
    )
    text = "".join(event.choices[0].delta.content or "" for event in chat)
    assert "4821937" in text


def test_rows_that_run_together_answer_what_they_answer_alone(server, lib, nano):
    address, _ = server
    other = httpx.post(address + "/v1/memories", json={"id": "other", "text": FILLER + FERRY}, timeout=HANG_SECONDS)
    assert other.status_code == 201
    prompts = [PROMPT, "The secret code of the calm ferry is"]
    wanted = [(prompt, memory) for prompt in prompts for memory in ("lib", "other", None)]

    def one(pair):
        prompt, memory = pair
        body = {"model": "nano", "prompt": prompt, "max_tokens": 8, **({"memory": memory} if memory else {})}
        return httpx.post(address + "/v1/completions", json=body, timeout=HANG_SECONDS).json()["choices"][0]["text"]

    alone = [one(pair) for pair in wanted]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, wanted)) == alone


def expected_tokens(server, prompt, id, count):
    """By the library alone, from the memory as the server opens it."""
    answers = server[1]
    model, tokenizer = answers.model, answers.tokenizer
    if id is not None:
        memory = answers.memories.open("default", [id]).memory
        return ask(model, tokenizer, memory, prompt, max_new_tokens=count).tokens
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_twelve_answers_in_three_rows_are_those_of_ask_token_by_token(nano, tmp_path, monkeypatch, form):
    prompts = [PROMPT, "The secret code of the calm ferry is", f"{FILLER[:200]}\nQuestion: {QUESTION}\nAnswer:", "The"]
    # rows leave after different numbers of tokens, and others join in their places
    wanted = [
        (prompts[number % 4], ("a", "b", None)[number % 3], (9, 3, 14, 6, 11)[number % 5]) for number in range(12)
    ]
    with serving(nano, tmp_path, key_values=form) as server:
        for id, text in (("a", LANTERN + FILLER), ("b", FILLER + FERRY)):
            made = httpx.post(server[0] + "/v1/memories", json={"id": id, "text": text}, timeout=HANG_SECONDS)
            assert made.json()["formats"]["key_values"] == form
        expected = [expected_tokens(server, *one) for one in wanted]
        worker = server[1].worker
        turn, sizes, late = worker._turn, [], time.monotonic() + HANG_SECONDS

        def counted():
            """No row begins before all requests are there."""
            if not sizes and worker.num_waiting < len(wanted) and time.monotonic() < late:
                time.sleep(0.005)
                return
            turn()
            sizes.append(worker.num_running)

        def tokens_of(one):
            prompt, id, count = one
            body = {"model": "nano", "prompt": prompt, "max_tokens": count, "logprobs": 0}
            more = {} if id is None else {"memory": id, "stop": "\n"}
            found = httpx.post(server[0] + "/v1/completions", json={**body, **more}, timeout=HANG_SECONDS).json()
            return found["choices"][0]["logprobs"]["tokens"], found["usage"]["completion_tokens"]

        alone = [tokens_of(one) for one in wanted]
        monkeypatch.setattr(worker, "_turn", counted)
        with ThreadPoolExecutor(len(wanted)) as pool:
            together = list(pool.map(tokens_of, wanted))
    # the token that ends an answer counts and has no text
    ends = end_tokens(nano[0])
    texts = [[nano[1].decode([token]) for token in tokens if token not in ends] for tokens in expected]
    assert together == alone == list(zip(texts, map(len, expected), strict=True))
    assert max(sizes) == 3 and len(sizes) < sum(map(len, expected))


def test_logprobs_are_those_of_the_model(openai_client, lib, nano):
    model, tokenizer = nano
    found = openai_client.completions.create(model="nano", prompt="The old road", max_tokens=3, logprobs=2)
    ids = torch.tensor([tokenizer("The old road")["input_ids"]])
    with torch.no_grad():
        shares = model(ids).logits[0, -1].log_softmax(-1)
    best = shares.max()
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs[0] == pytest.approx(float(best), abs=1e-4)
    assert len(logprobs.tokens) == 3 and "".join(logprobs.tokens) == found.choices[0].text
    chat = openai_client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "The old road"}],
        max_tokens=2,
        logprobs=True,
        top_logprobs=1,
    )
    content = chat.choices[0].logprobs.content
    assert content[0].top_logprobs[0].logprob == pytest.approx(content[0].logprob, abs=1e-6)


def test_a_seed_repeats_a_drawn_answer_and_choices_differ(openai_client):
    options = {"model": "nano", "prompt": "The old road", "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 2}
    first, again = (openai_client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and texts[0] != texts[1]


def test_a_memory_grows_is_edited_merged_and_deleted(client, nano):
    assert client.post("/v1/memories", json={"id": "notes", "text": FILLER}).status_code == 201
    more = client.post("/v1/memories/notes/documents", json={"documents": [{"name": "n", "text": LANTERN}]})
    assert more.json()["documents"] == 2
    number = client.get("/v1/memories/notes/documents").json()["data"][1]["id"]
    changed = LANTERN.replace("4821937", "1112223")
    assert client.put(f"/v1/memories/notes/documents/{number}", json={"text": changed}).status_code == 200
    body = {"model": "nano", "prompt": PROMPT, "memory": "notes", "stop": "\n", "max_tokens": 24}
    answer = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer == asked(nano, [FILLER, changed], PROMPT).text and "1112223" in answer
    part = client.get(f"/v1/memories/notes/documents/{number}", params={"stop": 500}).json()
    assert part["text"].strip() == changed
    merged = client.post("/v1/memories/both/merge", json={"memories": ["notes"]})
    assert merged.json()["documents"] == 2
    assert client.post("/v1/completions", json={**body, "memory": ["both"]}).json()["choices"][0]["text"] == answer
    assert client.delete(f"/v1/memories/notes/documents/{number}").json()["documents"] == 1
    assert client.delete("/v1/memories/notes").json()["deleted"] is True
    gone = client.post("/v1/completions", json=body)
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "memory_not_found"


def test_making_a_memory_again_changes_nothing_and_another_text_is_refused(client):
    body = {"id": "twice", "text": FILLER + LANTERN}
    first, second = (client.post("/v1/memories", json=body) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201) and first.json() == second.json()
    other = client.post("/v1/memories", json={"id": "twice", "text": FERRY})
    assert other.status_code == 409 and other.json()["error"]["code"] == "memory_exists"


def test_a_merge_into_a_new_memory_is_there_whole_or_not_at_all(client, monkeypatch):
    assert client.post("/v1/memories", json={"id": "source", "text": FERRY}).status_code == 201

    def broken(library, sources):
        library.add(torch.tensor([5, 6, 7]), name="half")
        raise ValueError("the merge stopped")

    monkeypatch.setattr(Library, "merge", broken)
    assert client.post("/v1/memories/merged/merge", json={"memories": ["source"]}).status_code == 400
    assert client.get("/v1/memories/merged").status_code == 404
    monkeypatch.undo()
    merged = client.post("/v1/memories/merged/merge", json={"memories": ["source"]}).json()
    assert (merged["status"], merged["documents"]) == ("ready", 1)


def test_a_memory_that_goes_or_is_damaged_hides_no_other_from_the_list(client, server, monkeypatch):
    memories = server[1].memories
    for id in ("hurt", "whole"):
        assert client.post("/v1/memories", json={"id": id, "text": FERRY}).status_code == 201
    place = memories.folder / "default" / "hurt.hsa"
    (place / "manifest.json").write_bytes(b"{")
    known = memories.ids("default")
    monkeypatch.setattr(memories, "ids", lambda namespace: [*known, "gone"])
    states = {one["id"]: one["status"] for one in client.get("/v1/memories").json()["data"]}
    assert (states["hurt"], states["whole"]) == ("damaged", "ready") and set(states) == set(known)
    shutil.rmtree(place)


def test_files_that_a_writer_takes_away_meanwhile_are_no_error_of_the_disk(tmp_path, monkeypatch):
    (tmp_path / "kept").write_bytes(b"1234")
    (tmp_path / "gone").write_bytes(b"12")
    lstat = os.lstat

    def late(path, **options):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", late)
    assert bytes_of(tmp_path) == 4


def test_tokenising_and_opening_do_not_hold_the_event_loop(client, server, monkeypatch):
    """Other requests go on while a long prompt is tokenised or a memory opened."""
    answers, seen = server[1], []
    for owner, name in ((answers, "prompts"), (answers.memories, "_stamp")):
        real = getattr(owner, name)

        def noted(*args, real=real):
            with suppress(RuntimeError):
                seen.append(asyncio.get_running_loop())
            seen.append(None)
            return real(*args)

        monkeypatch.setattr(owner, name, noted)
    body = {"model": "nano", "prompt": PROMPT, "max_tokens": 1, "memory": "loop"}
    assert client.post("/v1/memories", json={"id": "loop", "text": FERRY}).status_code == 201
    assert client.post("/v1/completions", json=body).status_code == 200
    assert len(seen) >= 2 and set(seen) == {None}


def test_merging_does_not_evict_what_is_merged(nano, tmp_path):
    answers = answering(nano, tmp_path, disk_bytes=2**20, evict=True)
    memories = answers.memories
    try:
        size = memories.create("default", "old", [("a", FERRY)])["bytes"]
        memories.disk.limits = replace(memories.limits, disk_bytes=size + size // 2)
        with pytest.raises(ServeError, match="passes the budget"):
            memories.merge("default", "new", ["old"])
        assert memories.ids("default") == ["old"]
    finally:
        answers.worker.close()


def test_a_memory_that_changes_while_it_is_opened_is_opened_again_in_one_state(nano, tmp_path, monkeypatch):
    answers = answering(nano, tmp_path)
    memories, opened = answers.memories, []
    try:
        memories.create("default", "one", [("a", FERRY)])

        def late(place, **options):
            opened.append(open_memory(place, **options))
            if len(opened) == 1:
                memories.append("default", "one", [("b", LANTERN)])
            return opened[-1]

        monkeypatch.setattr("hsa_ultralong.serve.memories.open_memory", late)
        found = memories.open("default", ["one"])
        assert len(opened) == 2 and found.memory is opened[1]
        assert len(found.documents) == len(found.memory.documents) == 2
    finally:
        answers.worker.close()


def test_progress_comes_as_events(client):
    with client.stream("POST", "/v1/memories", json={"id": "slow", "text": FILLER * 3, "stream": True}) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert events[0]["object"] == "memory.progress" and events[-1]["id"] == "slow"
    assert events[-2]["tokens"] == events[-2]["total"] == events[-1]["tokens"]


def test_a_streamed_change_that_is_refused_has_its_own_status(client, server):
    memories, more = server[1].memories, {"documents": [{"text": LANTERN}], "stream": True}
    assert client.post("/v1/memories", json={"id": "there", "text": FERRY}).status_code == 201
    for path, body, status, code in (
        ("/v1/memories", {"id": "there", "text": LANTERN, "stream": True}, 409, "memory_exists"),
        ("/v1/memories/missing/documents", more, 404, "memory_not_found"),
    ):
        found = client.post(path, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    with memories._changing(memories.folder / "default" / "there.hsa"):
        found = client.post("/v1/memories/there/documents", json=more)
        assert (found.status_code, found.json()["error"]["code"]) == (409, "memory_busy")
    before, memories.disk.limits = memories.disk.limits, replace(memories.limits, disk_bytes=1)
    try:
        found = client.post("/v1/memories/there/files?stream=true", files=[("files", ("a.txt", LANTERN.encode()))])
        assert (found.status_code, found.json()["error"]["code"]) == (507, "disk_budget")
    finally:
        memories.disk.limits = before
    made = client.post("/v1/memories/there/documents", json=more)
    assert made.status_code == 200 and made.text.endswith("data: [DONE]\n\n")


def test_what_fails_in_the_middle_of_a_stream_is_its_last_event(client, monkeypatch):
    def broken(library, tokens, progress, **_):
        progress(1, len(tokens))
        raise ValueError("the text ended")

    monkeypatch.setattr(Library, "add", broken)
    found = client.post("/v1/memories", json={"id": "never", "text": FERRY, "stream": True})
    events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
    assert found.status_code == 201 and events[0]["object"] == "memory.progress"
    assert events[-1]["error"]["message"] == "the text ended" and client.get("/v1/memories/never").status_code == 404


def test_uploaded_files_become_documents_and_their_names_stay_names(client, server):
    files = [("files", ("../../evil.txt", FERRY.encode())), ("files", ("b.md", LANTERN.encode("utf-16")))]
    made = client.post("/v1/memories/up/files", files=files)
    assert made.status_code == 201, made.text
    names = [one["name"] for one in client.get("/v1/memories/up/documents").json()["data"]]
    assert names == ["evil.txt", "b.md"]
    more = client.post("/v1/memories/up/files", files=[("files", ("c.jsonl", b'{"text": "x y z"}\n'))])
    assert more.json()["documents"] == 3
    bad = client.post("/v1/memories/up2/files", files=[("files", ("c.bin", b"\x00\x01\xff\xfe\x00"))])
    assert bad.status_code == 400 and "tmp" not in bad.text


def test_uploaded_files_lie_below_the_folder_of_memories_and_a_start_removes_what_a_kill_left(
    nano, tmp_path, monkeypatch
):
    from hsa_ultralong.serve import uploads

    seen, real = [], uploads.read_sources
    monkeypatch.setattr(uploads, "read_sources", lambda file: seen.append(file.path) or real(file))
    folder = tmp_path / "memories"
    left = folder / ".uploads" / "killed" / "0"
    left.mkdir(parents=True)
    (left / "secret.txt").write_text(LANTERN)
    with serving(nano, folder, disk_bytes=2**20) as (address, answers):
        assert not left.exists() and answers.memories.disk.used() == 0
        files = [("files", ("a.txt", LANTERN.encode()))]
        made = httpx.post(address + "/v1/memories/up/files", files=files, timeout=HANG_SECONDS)
        assert made.status_code == 201 and made.json()["documents"] == 1
        assert seen and all(folder / ".uploads" in one.parents for one in seen)
        assert list((folder / ".uploads").iterdir()) == []
        with held_upload(folder / ".uploads") as other:
            remove_uploads(folder / ".uploads")
            assert other.is_dir()


def test_keys_part_namespaces(nano, tmp_path):
    keys = {hashlib.sha256(key.encode()).hexdigest(): name for key, name in (("ka", "anna"), ("kb", "bob"))}
    with (
        serving(nano, tmp_path, keys=keys) as (address, _),
        httpx.Client(base_url=address, timeout=HANG_SECONDS) as client,
    ):
        anna, bob = ({"Authorization": f"Bearer {key}"} for key in ("ka", "kb"))
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic ka"}):
            found = client.get("/v1/memories", headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/memories", json={"id": "m", "text": LANTERN}, headers=anna).status_code == 201
        assert client.get("/v1/memories", headers=bob).json()["data"] == []
        assert client.get("/v1/memories/m", headers=bob).status_code == 404
        assert client.get("/v1/memories/m", headers=anna).json()["tokens"] > 0
        assert client.get("/health").json() == {"status": "ok"}


def test_a_disk_budget_refuses_or_evicts_what_was_asked_for_longest_ago(nano, tmp_path):
    def make(address, number):
        return httpx.post(address + "/v1/memories", json={"id": f"m{number}", "text": FILLER}, timeout=HANG_SECONDS)

    with serving(nano, tmp_path / "a") as (address, answers):
        make(address, 0)
        room = int(2.5 * answers.memories.bytes_used())
    with serving(nano, tmp_path / "a", disk_bytes=room) as (address, _):
        made = [make(address, number) for number in range(1, 3)]
    assert made[0].status_code == 201 and made[-1].status_code == 507 and "disk_budget" in made[-1].text
    with serving(nano, tmp_path / "b", disk_bytes=room, evict=True) as (address, answers):
        for number in range(3):
            assert make(address, number).status_code == 201
        assert "m0" not in answers.memories.ids("default") and "m2" in answers.memories.ids("default")


def test_models_health_metrics_and_the_page(client, openai_client):
    assert [one.id for one in openai_client.models.list()] == ["nano"]
    assert client.get("/ready").json() == {"status": "ready"}
    openai_client.completions.create(model="nano", prompt="The old road", max_tokens=2)
    numbers = client.get("/metrics").text
    assert "hsa_tokens_decoded" in numbers and 'hsa_answers_total{finish="' in numbers
    page = client.get("/")
    assert page.status_code == 200 and "https://" not in page.text and "http://" not in page.text
