"""What KoboldCpp added, as KoboldAI Lite and SillyTavern send and read it."""

import threading

import pytest
from serving import GREEDY, as_lite_reads, asking, counting, eventually, reading, slowly

from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.server.fields import read_generation

LITES_REQUEST = {
    "n": 1,
    "max_context_length": 4096,
    "max_length": 20,
    "rep_pen": 1.07,
    "temperature": 0.00001,
    "top_p": 0.92,
    "top_k": 100,
    "top_a": 0,
    "typical": 1,
    "tfs": 1,
    "rep_pen_range": 360,
    "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "memory": "The door ",
    "trim_stop": True,
    "genkey": "KCPP1234",
    "min_p": 0,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0,
    "nsigma": 0,
    "banned_tokens": [],
    "render_special": False,
    "logprobs": False,
    "replace_instruct_placeholders": True,
    "presence_penalty": 0,
    "logit_bias": {},
    "stop_sequence": ["You:", "\nYou "],
    "use_default_badwordsids": False,
    "bypass_eos": False,
    "quiet": True,
    "prompt": "opened and",
}
"""Field by field what KoboldAI Lite sends when it streams; what its users wrote is ours."""


class TestTraps:
    def test_lite_is_told_of_a_release_that_streams(self, ask):
        version = ask("GET", "/api/extra/version").json
        assert version["result"] == "KoboldCpp" and tuple(map(int, version["version"].split("."))) >= (1, 49)
        assert version["protected"] is False

    def test_memory_that_lite_sends_apart_stands_before_the_prompt(self, ask):
        apart = ask("POST", "/api/extra/generate/stream", {**GREEDY, "memory": "The door ", "prompt": "opened and"})
        whole = ask("POST", "/api/v1/generate", GREEDY).text
        assert "".join(data["token"] for _, data in as_lite_reads(apart.body)) == whole

    def test_more_context_than_there_is_leaves_room_for_soft_prompt_and_new_text(self, ask, engine):
        story = "The clock on the wall had stopped. " * 300
        for asked in (4096, 512):
            fields = {**GREEDY, "prompt": story, "max_context_length": asked, "max_length": 80}
            answer = ask("POST", "/api/v1/generate", {**fields, "soft_prompt": "space.zip"})
            assert answer.status == 200 and answer.json["results"][0]["finish_reason"] == "length"
        assert len(engine.token_ids(story)) > 4096

    @pytest.mark.parametrize("memory", ["", "The door "])
    def test_more_new_text_than_there_is_room_for_is_less(self, ask, model, memory):
        with counting(model) as forwards:
            fields = {**GREEDY, "memory": memory, "max_length": 1536, "max_context_length": 12288}
            result = ask("POST", "/api/extra/generate/stream", {**fields, "soft_prompt": "space.zip"})
        n_text = len("The door opened and")
        assert 512 - 6 - n_text <= len(forwards) <= 512 - 6
        assert as_lite_reads(result.body)[-1][1]["finish_reason"] == "length"

    def test_the_stream_is_exactly_as_lite_takes_it_apart(self, ask):
        answer = ask("POST", "/api/extra/generate/stream", LITES_REQUEST)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = as_lite_reads(answer.body)
        assert len(events) > 5 and {name for name, _ in events} == {"message"}
        assert all(data["finish_reason"] is None and data["token"] for _, data in events[:-1])
        assert events[-1][1] == {"token": "", "finish_reason": "length"}
        plain = {**LITES_REQUEST, "genkey": ""}
        assert "".join(data["token"] for _, data in events) == ask("POST", "/api/v1/generate", plain).text

    def test_a_page_from_elsewhere_may_ask_where_it_was_allowed(self, session):
        with Server(session, port=0, origins=["https://lite.koboldai.net"]) as server:
            ask, lite = asking(server), {"Origin": "https://lite.koboldai.net"}
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
            preflight = ask("OPTIONS", "/api/extra/generate/stream", headers={**lite, **asked})
            assert preflight.status == 204
            assert preflight.headers["Access-Control-Allow-Origin"] == lite["Origin"]
            assert preflight.headers["Access-Control-Allow-Headers"] == "content-type"
            assert preflight.headers["Access-Control-Allow-Private-Network"] == "true"
            assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
            for method, path, body in (
                ("GET", "/api/v1/model", None),
                ("POST", "/api/v1/generate", GREEDY),
                ("POST", "/api/extra/generate/stream", GREEDY),
                ("POST", "/api/v1/generate", {}),
            ):
                answer = ask(method, path, body, lite)
                assert answer.status == (422 if body == {} else 200)
                assert answer.headers["Access-Control-Allow-Origin"] == lite["Origin"]


class TestStreams:
    def test_an_error_before_the_first_token_is_the_status(self, ask):
        answer = ask("POST", "/api/extra/generate/stream", {**GREEDY, "memory": "The clock. " * 200})
        assert answer.status == 422 and answer.json["detail"]["type"] == "context_exceeded"
        assert ask("POST", "/api/extra/generate/stream", {"prompt": 5}).status == 422

    def test_an_error_later_ends_the_stream_with_an_event_of_its_own(self, ask, model, caplog):
        calls = []

        def fail_at_last(*_):
            calls.append(1)
            if len(calls) > 8:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

        handle = model.register_forward_hook(fail_at_last)
        events = as_lite_reads(ask("POST", "/api/extra/generate/stream", GREEDY).body)
        handle.remove()
        assert [name for name, _ in events[:-1]] == ["message"] * (len(events) - 1) and len(events) > 3
        name, detail = events[-1]
        assert name == "error" and detail["type"] == "out_of_memory.gpu.cuda"
        assert ask("POST", "/api/v1/generate", GREEDY).status == 200

    def test_stop_sequences_end_it_and_are_kept_unless_trimmed(self, ask):
        whole = ask("POST", "/api/v1/generate", GREEDY).text
        stop = whole[6:9]
        until = whole[: whole.index(stop)]
        for trim, expected in ((True, until), (False, until + stop)):
            fields = {**GREEDY, "stop_sequence": ["never", stop], "trim_stop": trim}
            (result,) = ask("POST", "/api/v1/generate", fields).json["results"]
            assert result == {"text": expected, "finish_reason": "stop"}

    @pytest.mark.parametrize("path", ["/api/extra/generate/stream", "/v1/completions", "/v1/chat/completions"])
    def test_a_client_that_hangs_up_ends_the_model_within_a_token(self, server, model, path):
        fields = {**GREEDY, "max_length": 400, "max_tokens": 400, "stream": True}
        fields["messages"] = [{"role": "user", "content": "Hello"}]
        with slowly(model, 0.05), counting(model) as forwards:
            with reading(server, path, fields) as response:
                response.fp.readline()
                eventually(lambda: len(forwards) > 3)
            at_end = len(forwards)
            eventually(lambda: len(server.queue) == 0)
            assert len(forwards) <= at_end + 2

    def test_the_first_line_alone(self, ask):
        assert ask("POST", "/api/v1/generate", {**GREEDY, "singleline": True}).status == 200
        # The tiny model writes no line breaks; what ends a text at any stop sequence is tested above.
        (settings,) = read_generation({"prompt": "x", "singleline": True, "stop_sequence": ["You:"]}).settings
        assert settings.stop_sequence == ("You:", "\n") and not settings.keep_stop


class TestAskingAndStopping:
    def test_abort_with_an_empty_body_ends_ones_own(self, ask, server, model):
        answers = []
        with slowly(model):
            fields = {**GREEDY, "max_length": 400}
            thread = threading.Thread(target=lambda: answers.append(ask("POST", "/api/v1/generate", fields)))
            thread.start()
            eventually(lambda: len(server.queue) == 1)
            stopped = ask("POST", "/api/extra/abort", b"")  # SillyTavern: no body, and no content type
            thread.join()
        assert stopped.json == {"success": "true", "done": "true"}
        assert answers[0].status == 200 and answers[0].json["results"][0]["finish_reason"] == "stop"
        assert ask("POST", "/api/extra/abort").json == {"success": "false", "done": "true"}

    def test_abort_does_not_end_what_others_asked_for(self, ask, server, model):
        others = []
        with slowly(model, 0.01):
            for name in "ab":
                headers = {"User-Agent": name}
                fields = {**GREEDY, "genkey": f"key {name}"}
                target = lambda headers=headers, fields=fields: others.append(  # noqa: E731
                    ask("POST", "/api/v1/generate", fields, headers)
                )
                threading.Thread(target=target).start()
            eventually(lambda: len(server.queue) == 2)
            assert ask("POST", "/api/extra/abort", {}, {"User-Agent": "c"}).json["success"] == "false"
            assert ask("POST", "/api/extra/abort", {"genkey": "key z"}).json["success"] == "false"
            assert ask("POST", "/api/extra/abort", {"genkey": "key a"}, {"User-Agent": "c"}).json["success"] == "true"
            eventually(lambda: len(others) == 2)
        reasons = sorted(each.json["results"][0]["finish_reason"] for each in others)
        assert reasons == ["length", "stop"]

    def test_the_text_so_far_can_be_asked_for_by_its_key(self, ask, server, model):
        with slowly(model, 0.03):
            answers = []
            fields = {**GREEDY, "genkey": "KCPP7"}
            thread = threading.Thread(
                target=lambda: answers.append(ask("POST", "/api/v1/generate", fields, {"User-Agent": "Lite"}))
            )
            thread.start()

            def so_far(**body):
                return ask("POST", "/api/extra/generate/check", body).text

            eventually(lambda: so_far(genkey="KCPP7"))
            early = so_far(genkey="KCPP7")
            assert ask("GET", "/api/extra/generate/check").text, "the only one there is"
            assert so_far(genkey="another") == ""
            thread.join()
        whole = answers[0].text
        assert whole.startswith(early) and len(early) < len(whole)
        assert so_far(genkey="KCPP7") == whole, "also when the answer was lost"
        assert so_far() == ""


class TestOtherExtras:
    def test_tokens_are_counted_as_the_model_reads_them(self, ask, engine):
        ids = engine.token_ids("The door opened and")
        assert ask("POST", "/api/extra/tokencount", {"prompt": "The door opened and"}).json == {
            "value": len(ids),
            "ids": ids,
        }

    def test_a_soft_prompt_that_stands_in_a_text_is_counted_with_it(self, ask, engine, session):
        ids = engine.token_ids("The door opened and")
        tagged = "<softprompt:noir>The door opened and"
        assert ask("POST", "/api/extra/tokencount", {"prompt": tagged}).json == {"value": 4 + len(ids), "ids": ids}
        inside = "The door <softprompt:noir>opened<softprompt:space> and"
        read = engine.token_ids(
            "The door " + session.softprompt("noir.zip") + "opened" + session.softprompt("space.zip") + " and"
        )
        assert ask("POST", "/api/extra/tokencount", {"prompt": inside}).json["value"] == len(read) > 4 + 6

    @pytest.mark.parametrize("name", ["absent", "wide", "broken"])
    def test_a_tag_that_nobody_can_read_is_counted_as_the_text_that_it_is(self, ask, engine, name):
        ids = engine.token_ids(f"The <softprompt:{name}>")
        answer = ask("POST", "/api/extra/tokencount", {"prompt": f"The <softprompt:{name}>"})
        assert answer.status == 200 and answer.json == {"value": len(ids), "ids": ids}

    def test_small_answers(self, ask):
        assert ask("GET", "/api/extra/true_max_context_length").json == {"value": 512}
        assert ask("GET", "/api/extra/preloadstory").json == {}
        assert ask("GET", "/sdapi/v1/sd-models").status == 404
        ask("POST", "/api/v1/generate", {**GREEDY, "sampler_seed": 7})
        perf = ask("GET", "/api/extra/perf").json
        assert perf["last_token_count"] == 20 and perf["last_seed"] == 7 and perf["total_gens"] == 1
        assert perf["queue"] == 0 and perf["idle"] == 1 and perf["last_eval"] > 0

    def test_what_sillytavern_asks_first(self, ask):
        headers = {"Content-Type": "application/json"}
        for path in ("/api/v1/info/version", "/api/extra/version", "/api/v1/model"):
            assert ask("GET", path, headers=headers).json["result"]

    def test_what_sillytavern_sends_is_taken(self, ask):
        fields = {
            "prompt": "The door opened and",
            "use_story": False,
            "use_memory": False,
            "use_authors_note": False,
            "use_world_info": False,
            "max_context_length": 2048,
            "max_length": 16,
            "rep_pen": 1.1,
            "rep_pen_range": 600,
            "rep_pen_slope": 0,
            "temperature": 1,
            "tfs": 1,
            "top_a": 0,
            "top_k": 0,
            "top_p": 1,
            "min_p": 0,
            "typical": 1,
            "sampler_order": [0, 1, 2, 3, 4, 5, 6],
            "singleline": False,
            "use_default_badwordsids": True,
            "mirostat": 0,
            "mirostat_eta": 0.1,
            "mirostat_tau": 5,
            "grammar": "",
            "stop_sequence": ["\nYou:"],
        }
        assert ask("POST", "/api/v1/generate", fields).status == 200


class TestSoftPrompts:
    def test_several_at_once_for_one_request(self, ask, engine, session):
        texts = [
            ask("POST", "/api/v1/generate", {**GREEDY, "soft_prompt": names}).text
            for names in (["noir.zip", "space.zip"], ["space.zip", "noir.zip"], ["noir.zip"], [], "noir.zip", [""])
        ]
        assert texts[2] == texts[4] and texts[3] == texts[5] and len(set(texts)) == 4
        assert session.selection == ()

    def test_the_selection_can_be_read_and_changed(self, ask, session):
        answer = ask("PUT", "/api/extra/softprompts", {"selection": ["noir.zip", "space.zip"]})
        assert answer.json["selection"] == ["noir.zip", "space.zip"] == list(session.selection)
        assert ask("GET", "/api/extra/softprompts").json["n_tokens"] == 10
        refused = ask("PUT", "/api/extra/softprompts", {"selection": ["noir.zip", "wide.zip"]})
        assert refused.status == 422 and "64 columns" in refused.json["detail"]["selection"][0]
        assert session.selection == ("noir.zip", "space.zip")
        assert ask("PUT", "/api/extra/softprompts", {"selection": ""}).json["selection"] == []
        assert ask("PUT", "/api/extra/softprompts", {}).status == 422
