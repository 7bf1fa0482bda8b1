"""The register and spill budget, judged on ptxas output as CUDA 13.0 prints it; no compiler needed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "cmake" / "ptxas.py"

KERNEL = "_ZN6illada6remask49_GLOBAL__N__e6e554ab_16_sample_tokens_cu_ecff33fc6kernelILb0EEEvNS0_6ParamsE"
OUTPUT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90a'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 108 registers, used 1 barriers, 400 bytes smem
ptxas info    : Compile time = 429.037 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    24 bytes stack frame, 32 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers, 24 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Function properties for helper
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.fixture
def results(ptxas):
    """Return the results of two kernels without faults, in one file, for two archs."""

    def compiled(arch, registers):
        kernels = [ptxas.Kernel("k<4>", registers, 400), ptxas.Kernel("other", 32)]
        return ptxas.Compiled("csrc/k.cu", arch, 1.0, kernels)

    return [compiled("80", 64), compiled("90a", 96)]


def test_records_of_a_build_are_read_by_arch(ptxas, tmp_path):
    """As the launcher leaves them: one output of several archs, one PTX an arch."""
    source = TOOL.parent.parent / "csrc" / "attention" / "plan.cu"
    output = OUTPUT.replace("sm_90a", "sm_80").replace("Used 108", "Used 90") + OUTPUT
    entry = f".visible .entry {KERNEL}(\n)\n.maxntid 384, 1, 1\n{{ setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.inc.sync.aligned.u32 232; }}"
    ptx = [".target sm_80\n", f".target sm_90a\n{entry}\n"]
    record = {"source": str(source), "seconds": 4.0, "output": output, "ptx": ptx}
    (tmp_path / "plan.cu.o.json").write_text(json.dumps(record))
    found = {result.arch: result for result in ptxas.recorded(tmp_path)}
    assert set(found) == {"80", "90a"} and {result.file for result in found.values()} == {"csrc/attention/plan.cu"}
    assert [found[arch].kernels[0].registers for arch in ("80", "90a")] == [90, 108]
    assert [found[arch].kernels[0].warpgroup_registers for arch in ("80", "90a")] == [[], [40, 232]]
    assert found["90a"].kernels[0].threads == 384 and found["80"].seconds == 2.0


def test_the_launcher_keeps_output_and_ptx_and_passes_faults_on(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do case "$1" in --keep-dir) kept="$2";; -c) source="$2";; esac; shift; done\n'
        'echo "said of $source"; [ -z "$kept" ] || echo .target sm_90a > "$kept/k.ptx"; [ "$source" != bad.cu ]\n'
    )
    compiler.chmod(0o755)

    def launch(*command):
        tool = TOOL.with_name("ptxas_record.py")
        command = [sys.executable, tool, tmp_path / "records", compiler, *command]
        return subprocess.run(command, capture_output=True, text=True)

    assert launch("-c", "good.cu", "-o", "folder/good.cu.o").returncode == 0
    record = json.loads((tmp_path / "records" / "good.cu.o.json").read_text())
    assert record["source"] == "good.cu" and record["output"] == "said of good.cu\n"
    assert record["ptx"] == [".target sm_90a\n"]
    failed = launch("-c", "bad.cu", "-o", "bad.cu.o")
    assert failed.returncode == 1 and "said of bad.cu" in failed.stderr
    assert not (tmp_path / "records" / "bad.cu.o.json").exists()
    assert "said of good.cu" in launch("-c", "good.cu", "-o", "good.cu.o").stderr  # no line of ptxas: a warning
    assert launch("--version").stdout == "said of \n"  # not a compilation: run as it is


def test_parse(ptxas):
    kernels, remarks = ptxas.parse(OUTPUT)
    assert kernels == [
        ptxas.Kernel(KERNEL, 108, 400, 0, 0, 0),
        ptxas.Kernel("other", 128, 0, 24, 32, 72),
        ptxas.Kernel("helper", None, 0, 16, 0, 0),
    ]
    assert remarks == []


def test_parse_keeps_what_ptxas_did_to_wgmma(ptxas):
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    remarks = ptxas.parse(OUTPUT + line)[1]
    assert remarks == [line.split(" : ")[1]]
    (said,) = ptxas.faults([ptxas.Compiled("csrc/k_sm90.cu", "90a", 1.0, [], remarks)])
    assert "csrc/k_sm90.cu on sm_90a" in said and "serialized" in said


@pytest.mark.parametrize(
    "demangled,short",
    [
        (
            "void illada::sampling::(anonymous namespace)::k<illada::Half, false>(illada::sampling::Params, int)",
            "k<Half,false>",
        ),
        ("void illada::k<(int)128, -3, (bool)1>(float*)", "k<128,-3,1>"),
        ("void illada::k<(illada::attention::DqAccumulation)3, false>(int)", "k<3,false>"),
        ("illada::k(illada::P)", "k"),
        ("void k<illada::Tile<float, 4>, unsigned char>(int (*)(int))", "k<Tile<float,4>,unsigned char>"),
        ("plain_c_name", "plain_c_name"),
    ],
)
def test_short_name(ptxas, demangled, short):
    assert ptxas.short_name(demangled) == short


def test_files_of_wgmma_kernels_have_one_arch(ptxas):
    assert ptxas.archs_of("csrc/sampling/linear_sample_tokens_sm90.cu", ["80", "90a", "120"]) == ["90a"]
    assert ptxas.archs_of("csrc/sampling/sample_tokens.cu", ["80", "90a", "120"]) == ["80", "90a", "120"]


def test_spills_and_stack_are_faults_whatever_the_budget(ptxas):
    said = ptxas.faults([ptxas.Compiled("csrc/k.cu", "90a", 1.0, ptxas.parse(OUTPUT)[0])])
    assert len(said) == 2
    assert said[0].startswith(
        "other on sm_90a: 24 bytes of stack, 32 of spill stores, 72 of spill loads; none is allowed"
    )
    assert said[1].startswith("helper on sm_90a: 16 bytes of stack")


PTX = """
.visible .entry _Zkeys(
	.param .b32 a
)
.maxntid 384
.minnctapersm 1
{
	setmaxnreg.dec.sync.aligned.u32 40;
	setmaxnreg.inc.sync.aligned.u32 232;
	setmaxnreg.inc.sync.aligned.u32 232;
}
.entry plain(
)
.maxntid 128
{
	ret;
}
"""


def test_what_setmaxnreg_asks_for_is_read_from_ptx(ptxas):
    assert ptxas.launch_bounds(PTX) == {"_Zkeys": (384, [40, 232]), "plain": (128, [])}


@pytest.mark.parametrize(
    "threads, launched, split, fault",
    [
        (384, 168, [40, 232], None),
        (384, 168, [24, 240], None),
        (512, 128, [32, 160], None),
        (384, 168, [32, 240], "asks for 32 + 2 x 240 = 512 registers a lane, but .* 3 x 168 = 504: it would wait"),
        (384, 160, [40, 232], "40 [+] 2 x 232 = 504 registers a lane, but the CTA is launched with 3 x 160 = 480"),
        (384, 168, [240], "one producer warpgroup gives registers up"),
        (0, 168, [40, 232], "launch bounds say how many"),
        (128, 168, [], None),
    ],
)
def test_warpgroups_share_what_the_cta_was_launched_with(ptxas, threads, launched, split, fault):
    kernel = ptxas.Kernel("k", launched, threads=threads, warpgroup_registers=split)
    said = ptxas.faults([ptxas.Compiled("csrc/k_sm90.cu", "90a", 1.0, [kernel])])
    if fault is None:
        assert said == []
    else:
        assert re.search(fault.replace("32 + 2", "32 [+] 2"), said[0]) and said[0].startswith("k on sm_90a: ")


def test_two_kernels_of_one_name_are_a_fault(ptxas, results):
    assert ptxas.faults(results) == []
    (said, _) = ptxas.faults([*results, ptxas.Compiled("csrc/b.cu", "80", 1.0, results[0].kernels)])
    assert "two kernels have this name (csrc/k.cu, csrc/b.cu)" in said


def test_over_budget(ptxas, results):
    budget = ptxas.measured(results)
    assert ptxas.over_budget(results, budget, ["80", "90a"]) == []
    results[1].kernels[0].registers += 1
    results[0].kernels[0].smem += 8
    results[0].kernels[1].registers -= 1  # under the budget is fine
    assert [line.partition(";")[0] for line in ptxas.over_budget(results, budget, ["80", "90a"])] == [
        "k<4> on sm_80: smem 408, over the budget of 400",
        "k<4> on sm_90a: registers 97, over the budget of 96",
    ]


@pytest.mark.parametrize(
    "threads,allowed,used,fault",
    [(256, 83, 96, False), (256, 80, 88, True), (128, 128, 129, True), (128, 129, 136, False), (0, 83, 84, True)],
)
def test_another_cuda_may_take_registers_where_as_many_ctas_fit(ptxas, threads, allowed, used, fault):
    def compiled(registers, smem=8):
        return [ptxas.Compiled("csrc/k.cu", "120", 1.0, [ptxas.Kernel("k", registers, smem, threads=threads)])]

    budget = ptxas.measured(compiled(allowed))
    assert len(ptxas.over_budget(compiled(used), budget, ["120"])) == 1
    said = ptxas.over_budget(compiled(used), budget, ["120"], same_cuda=False)
    assert [f"registers {used}, over the budget" in line for line in said] == [True] * fault
    assert len(ptxas.over_budget(compiled(allowed, smem=9), budget, ["120"], same_cuda=False)) == 1


def test_unknown_kernels_and_stale_entries_ask_for_an_update(ptxas, results):
    budget = ptxas.measured(results)
    budget["gone"] = {"sm_80": {"registers": 1, "smem": 0}, "sm_120": {"registers": 1, "smem": 0}}
    del budget["other"]["sm_90a"]
    said = ptxas.over_budget(results, budget, ["80", "90a"])
    assert said == [
        "other on sm_90a: not in the budget; `make ptxas UPDATE=1` adds it",
        "gone on sm_80: in the budget, but no kernel is; `make ptxas UPDATE=1` removes it",
    ]
    assert len(ptxas.over_budget(results, budget, ["80", "90a"], complete=False)) == 1


def test_budget_file_round_trip(ptxas, results):
    old = {"k<4>": {"sm_120": {"registers": 5, "smem": 0}}, "gone": {"sm_80": {"registers": 1, "smem": 0}}}
    text = ptxas.budget_text(ptxas.measured(results), old, ["80", "90a"], "13.0")
    written = json.loads(text)
    assert written["nvcc"] == "13.0" and list(written["kernels"]) == ["k<4>", "other"]
    assert list(written["kernels"]["k<4>"]) == ["sm_80", "sm_90a", "sm_120"]  # what was not compiled stays
    assert ptxas.over_budget(results, written["kernels"], ["80", "90a"]) == []


def test_main_fails_over_budget_and_updates(ptxas, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptxas, "toolkit", lambda nvcc: ("13.0", {"80", "90", "90a"}))
    monkeypatch.setattr(ptxas, "compile_file", lambda nvcc, file, arch, flags: results[arch == "90a"])
    budget = tmp_path / "budget.json"
    assert ptxas.main(["remask.cu", "--budget", str(budget), "--arch", "80"]) == 1
    assert "not in the budget" in capsys.readouterr().err
    budget.write_text(ptxas.budget_text(ptxas.measured(results), {}, [], "12.9"))
    assert ptxas.main(["remask.cu", "--budget", str(budget), "--arch", "80"]) == 0
    results[0].kernels[0].registers += 1
    assert ptxas.main(["remask.cu", "--budget", str(budget), "--arch", "80"]) == 1
    said = capsys.readouterr().err
    assert "registers 65, over the budget of 64" in said and "written by CUDA 12.9, this is 13.0" in said


def test_an_update_of_some_files_keeps_the_others(ptxas, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptxas, "toolkit", lambda nvcc: ("13.0", {"80", "90", "90a"}))
    monkeypatch.setattr(ptxas, "compile_file", lambda nvcc, file, arch, flags: results[arch == "90a"])
    budget = tmp_path / "budget.json"
    kept = {"another": {"sm_80": {"registers": 7, "smem": 0}}}
    budget.write_text(ptxas.budget_text({}, kept, [], "13.0"))
    command = ["remask.cu", "--budget", str(budget), "--arch", "80", "--update"]
    assert ptxas.main(command) == 0
    written = json.loads(budget.read_text())["kernels"]
    assert written == {**kept, **ptxas.measured(results[:1])}
    budget.write_text(ptxas.budget_text({}, kept, [], "12.9"))
    with pytest.raises(SystemExit):
        ptxas.main(command)
    assert "written by CUDA 12.9, this is 13.0: --update without a pattern" in capsys.readouterr().err


def test_headers_of_cutlass(ptxas, monkeypatch, tmp_path):
    """A named folder, else what `make` fetched into the checkout."""
    monkeypatch.setattr(ptxas, "ROOT", tmp_path)
    monkeypatch.delenv("ILLADA_CUTLASS_DIR", raising=False)
    (tmp_path / ".cache" / "cutlass-4.3.0.0.new").mkdir(parents=True)  # not complete
    with pytest.raises(SystemExit, match="no headers of CUTLASS in .cache; `make ptxas` fetches them"):
        ptxas.cutlass_include()
    for folder in (".cache/cutlass-4.2.0.0/cutlass_library/source/include", "mine/include"):
        (tmp_path / folder / "cutlass").mkdir(parents=True)
        (tmp_path / folder / "cutlass" / "version.h").touch()
        assert ptxas.cutlass_include() == str(tmp_path / folder)
        monkeypatch.setenv("ILLADA_CUTLASS_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("ILLADA_CUTLASS_DIR", str(tmp_path / "mine" / "include"))
    assert ptxas.cutlass_include() == str(tmp_path / "mine" / "include")
    monkeypatch.setenv("ILLADA_CUTLASS_DIR", "/no/where")
    with pytest.raises(SystemExit, match="no headers of CUTLASS in /no/where"):
        ptxas.cutlass_include()


def test_no_compiler(ptxas, capsys):
    with pytest.raises(SystemExit, match="Set CUDACXX=/path/to/nvcc"):
        ptxas.main(["--nvcc", "/nonexistent/nvcc"])
