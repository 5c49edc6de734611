"""What the hook costs in a real KoboldAI Client, against the host's own soft prompts.

    python benchmarks/koboldai.py CHECKOUT PYTHON

``CHECKOUT``: a KoboldAI Client; ``PYTHON``: the interpreter that runs it. Both contenders run at the same time
and take turns: two hosts, one with the hook and one without, with the same tiny model; and the two listings, on
the same 1,000 files in one process. Printed are medians, wall time and, where other work on the machine
would show in that, CPU time of the host's process; ratios are of CPU time.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts.real_host import RealHost, Wire, environment, make_models  # noqa: E402
from listing import Model, make_folder  # noqa: E402

from kobold_sp_plugin import SoftPrompt  # noqa: E402
from kobold_sp_plugin.compatibility import fingerprint  # noqa: E402

STARTS, REQUESTS, DROPS, LISTINGS = 5, 5, 5, 7
NEW_TOKENS = 200
LISTING = f"""
import sys, time
sys.path[:0] = [sys.argv[1], "."]
import fileops
from kobold_sp_plugin import Catalogue
from kobold_sp_plugin.compatibility import ModelFacts
facts = ModelFacts("model", 768, 2048)
for _ in range({LISTINGS}):
    catalogue = Catalogue("softprompts")
    times = []
    for work in (lambda: fileops.getspfiles(768), *[lambda: catalogue.entries(facts)] * 6):
        began = time.process_time()
        found = len(work())
        times.append(time.process_time() - began)
        assert found == 1000, found
    print(times[0], times[1], min(times[2:]))
"""
"""Run by the host's Python in its folder. A file that was just written is read again for a while, as its time
may hide another change; the last listings are those of files that are older."""


def cpu_seconds(host):
    """CPU time that the host's process has used so far."""
    fields = Path(f"/proc/{host.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listing(checkout, python, folder):
    """Seconds of ``getspfiles``, of our first listing and of a later one."""
    RealHost(checkout, python, folder, [], start=False)
    make_folder(folder / "softprompts", fingerprint(Model()), 1000)
    time.sleep(3)
    command = [python, "-c", LISTING, str(ROOT)]
    output = subprocess.run(command, cwd=folder, check=True, env=environment(), stdout=subprocess.PIPE).stdout
    rounds = [list(map(float, line.split())) for line in output.decode().splitlines()]
    return [median(column) for column in zip(*rounds)]


def report(what, own, ours, unit, scale=1.0):
    """Print two medians, theirs and ours, and what the ratio or difference is."""
    own, ours = median(own) * scale, median(ours) * scale
    print(f"  {what:<44} {own:9.3f} {ours:9.3f} {unit:<4} {ours - own:+8.3f}  x{ours / own:.3f}")


def main(checkout, python):
    """Measure and print."""
    print(f"load of the machine: {os.getloadavg()[0]:.1f}\n  {'':<44} {'own':>9} {'ours':>9}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own, first, later = listing(checkout, python, folder / "listing")
        report("1,000 files listed first, CPU", [own], [first], "ms", 1e3)
        report("1,000 files listed again, CPU", [own], [later], "ms", 1e3)

        models = make_models(python, folder / "models", ["gptj"])
        arguments = ["--model", "NeoCustom", "--path", str(models / "tiny-gptj")]
        arguments += ["--cpu", "--nobreakmodel", "--quiet", "--no_aria2"]
        hosts = [RealHost(checkout, python, folder / f"{armed}", arguments, armed, start=False) for armed in (0, 1)]
        times = Times()
        try:
            for turn in range(STARTS):
                for index in (0, 1) if turn % 2 else (1, 0):
                    hosts[index].stop() if hosts[index].process else None
                    hosts[index].start()
                    times["start until it listens, s"][index].append(hosts[index].start_seconds)
                    times["start until it listens, CPU, s"][index].append(cpu_seconds(hosts[index]))
                decode(hosts, times)
            times.report()
            drop(hosts[1])
        finally:
            for host in hosts:
                host.stop() if host.process else None


class Times(dict):
    """Of each thing that was measured: the host's own seconds, and ours."""

    def __missing__(self, what):
        self[what] = ([], [])
        return self[what]

    def report(self):
        """Print the medians."""
        for what, (own, ours) in self.items():
            name, unit = what.rsplit(", ", 1)
            report(name, own, ours, unit, 1e3 if unit == "ms" else 1.0)


def decode(hosts, times):
    """Time the tokens of requests. Processes that run the same differ by some percent: hence once for every start."""
    rows = np.random.RandomState(0).randn(20, 64).astype(np.float32)
    for host in hosts:
        wait(host)
    for what, filename in (("no soft prompt", ""), ("20 soft tokens", "it.zip")):
        texts = ([], [])
        for host in hosts:
            SoftPrompt(rows, {"name": "It"}).save(host.softprompts / "it.zip")
            host.ask("PUT", "config/soft_prompt", {"value": filename})
            host.generate(max_length=NEW_TOKENS)
        for turn in range(REQUESTS):
            for index in (0, 1) if turn % 2 else (1, 0):
                began, used = time.monotonic(), cpu_seconds(hosts[index])
                texts[index].append(hosts[index].generate(max_length=NEW_TOKENS, seed=turn))
                times[f"a token, {what}, ms"][index].append((time.monotonic() - began) / NEW_TOKENS)
                times[f"a token, {what}, CPU, ms"][index].append((cpu_seconds(hosts[index]) - used) / NEW_TOKENS)
        assert texts[0] == texts[1], "the texts differ"


def wait(host):
    """Wait until a host that listens has loaded its model, too: United is busy until then."""
    give_up = time.monotonic() + 60
    while True:
        try:
            return host.generate(max_length=1)
        except AssertionError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def drop(host):
    """Print how soon a file that is dropped into the folder is in the menu of an open page."""
    times = []
    with Wire(host) as wire:
        for number in range(DROPS):
            wire.forget()
            began = time.monotonic()
            SoftPrompt(np.ones((20, 64), np.float32), {"name": "Dropped"}).save(
                host.softprompts / f"dropped{number}.zip"
            )
            wire.hears("softprompts", when=lambda status, name=f"dropped{number}.zip": name in str(status))
            times.append(time.monotonic() - began)
    print(f"  a dropped file in the menu: {median(times):.2f} s, at most {max(times):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
