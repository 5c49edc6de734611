import torch


class Job:
    def __init__(self, input_ids, max_new_tokens, **options):
        self.ids, self.left = input_ids, max_new_tokens


class Generator:
    def __init__(self, model, cache, tokenizer, **options):
        self.model, self.tokenizer, self.jobs = model, tokenizer, []

    def enqueue(self, job):
        self.jobs.append(job)

    def cancel(self, job):
        if job in self.jobs:
            self.jobs.remove(job)

    def clear_queue(self):
        self.jobs.clear()

    def iterate(self):
        """One token of every job, and its end."""
        results = []
        for job in list(self.jobs):
            if not job.left:
                self.jobs.remove(job)
                results.append({"job": job, "eos": True})
                continue
            token = self.model.forward(job.ids[:, -1:], {}).argmax(-1)
            job.ids, job.left = torch.cat([job.ids, token], dim=1), job.left - 1
            results.append({"job": job, "text": self.tokenizer.decode(token[0])})
        return results
