"""Loopback servers that speak SGLang's and llama.cpp's protocols, with a model of transformers."""

from typing import Any

from teacher_server import Handler, TeacherServer
from torch import Tensor

LOWEST_FLOAT = -3.4028234663852886e38


class SGLangServer(TeacherServer):
    """`/generate` of SGLang: input log-probs from `logprob_start_len` on, and the top ones."""

    server_type = "sglang"

    def ids_of(self, body: dict[str, Any]) -> list[int]:
        return body["input_ids"]

    def top_of(self, body: dict[str, Any]) -> int:
        return body["top_logprobs_num"]

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, start = body["input_ids"], body["logprob_start_len"]
        log_probs = self.log_probs(ids, fresh="extra_key" in body or not start)
        rows = log_probs[start : len(ids) - 1]
        own = [[row[i].item(), i, None] for i, row in zip(ids[start + 1 :], rows, strict=True)]
        about: dict[str, Any] = {
            "prompt_tokens": len(ids),
            "completion_tokens": 1,
            "cached_tokens": start,
            "input_token_logprobs": [[None, ids[start], None], *own],
            "output_token_logprobs": [[log_probs[-1].max().item(), 0, None]],
        }
        if count := min(body["top_logprobs_num"], self.most_told):
            about["input_top_logprobs"] = [None, *(self._top(row, count) for row in rows)]
        return {"text": "", "output_ids": [0], "meta_info": about}

    def _top(self, row: Tensor, count: int) -> list[list[Any]]:
        values, ids = row.topk(count)
        return [[value, i, None] for value, i in zip(values.tolist(), ids.tolist(), strict=True)]


class LlamaCppHandler(Handler):
    """`/props` and models without a context, as llama.cpp has them."""

    def do_GET(self) -> None:
        owner = self.server.owner
        if self.path == "/props":
            settings = {"n_ctx": owner.context}
            self.answer(200, {"default_generation_settings": settings, "total_slots": 4})
        else:
            self.answer(200, {"object": "list", "data": [{"id": owner.name, "meta": {}}]})


class LlamaCppServer(TeacherServer):
    """`/completion` of llama.cpp: log-probs before sampling, of a generated token alone."""

    server_type, handler = "llama_cpp", LlamaCppHandler
    partial = frozenset[int]()  # tokens that end within a character

    def top_of(self, body: dict[str, Any]) -> int:
        return body["n_probs"]

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["n_predict"] == 1
        assert not body["post_sampling_probs"]
        ids = body["prompt"]
        row = self.log_probs(ids, fresh=not body["cache_prompt"])[-1]
        biased = row.clone()
        for token, bias in body["logit_bias"]:
            if token < self.vocab_size:  # others are left out
                biased[token] += bias
        made = int(biased.argmax())
        count = min(body["n_probs"], self.vocab_size)
        if self.clips:
            count = min(count, self.most_told)
        entries = [self._probability(row, i) for i in row.topk(count).indices.tolist()]
        answer: dict[str, Any] = {"content": "", "tokens_evaluated": len(ids), "truncated": False}
        if made not in self.partial:
            own = self._probability(row, made) | {"top_logprobs": entries}
            answer["completion_probabilities"] = [own]
        return answer

    def _probability(self, row: Tensor, token: int) -> dict[str, Any]:
        """An entry; JSON has no minus infinity."""
        log_prob = max(row[token].item(), LOWEST_FLOAT)
        return {"id": token, "token": "", "bytes": [], "logprob": log_prob}
