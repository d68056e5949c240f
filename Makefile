# Each command does its own set-up: a stamp in .venv says which extra is installed, and is renewed when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3

.PHONY: demo test check look bench
.NOTPARALLEL: # the commands share one environment

demo: .venv/plot.stamp
	.venv/bin/vision-ssl demo --out demo

test: check
	.venv/bin/python -m pytest

check: .venv/dev.stamp
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

look: .venv/plot.stamp
	.venv/bin/vision-ssl report mae_vit_small --data fashion-mnist-mini -o docs/report.html
	chromium --headless --hide-scrollbars --window-size=1000,1340 --screenshot=docs/report.png docs/report.html

bench: .venv/bench.stamp
	for group in augment photographs pipeline loss step extract probe decode startup scale; do \
		.venv/bin/python -m benchmarks.bench_$$group || exit; \
	done
	.venv/bin/python benchmarks/update_readme.py

.venv/%.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
