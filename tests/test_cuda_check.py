"""What `make cuda-check` reads and computes, without a compiler."""

import pytest
from _cuda_tables import BEGIN, END, Row, losses, recorded, text_of
from _occupancy import blocks_per_processor
from _sass import Loop, read_code, read_enums, read_usage, readable

# A listing of nf4_linear_decode for sm_80, shortened to its skeleton: a loop that fills a table, the main
# loop, the copy of it that checks bounds, a loop with a product for the low-rank step, and the end, which
# jumps to itself. Loops end by leaving through a call, or by a branch back.
LISTING = """
	.target	sm_80
//--------------------- .text._Zdecode --------------------------
	.section	.text._Zdecode,"ax",@progbits
	.align	128
.text._Zdecode:
        .type           _Zdecode,@function
        .size           _Zdecode,(.L_x_448 - _Zdecode)
_Zdecode:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   S2R R5, SR_TID.X ;
.L_x_10:
        /*25d0*/                   STS.128 [R28], R24 ;
        /*25e0*/              @!P5 BRA `(.L_x_10) ;
        /*27c0*/              @!P0 BRA `(.L_x_11) ;
.L_x_12:
        /*2960*/                   USHF.L.U32 UR8, UR4, 0xd, URZ ;
        /*2970*/                   LDGSTS.E.BYPASS.128 [R29], [R6.64], P5 ;
        /*2cb0*/                   HMMA.16816.F32.BF16 R48, R48, R8.reuse, RZ ;
        /*2d00*/              @!UP1 UIADD3 UR10, UR7, UR10, URZ ;
        /*2d10*/                   HMMA.16816.F32.BF16 R32, R32, R8, RZ ;
        /*45c0*/               @P0 CALL.REL.NOINC `(.L_x_11) ;
        /*45d0*/                   BRA `(.L_x_12) ;
.L_x_11:
        /*4650*/               @P5 BRA `(.L_x_13) ;
.L_x_14:
        /*4660*/                   ISETP.LE.AND P5, PT, R5, UR4, PT ;
        /*4670*/               @P1 BRA `(.L_x_15) ;
        /*4680*/                   LDGSTS.E.BYPASS.128 [R29], [R6.64], P5 ;
.L_x_15:
        /*4690*/                   HMMA.16816.F32.BF16 R48, R48, R8.reuse, RZ ;
        /*46a0*/                   HMMA.16816.F32.BF16 R32, R32, R8, RZ ;
        /*46b0*/                   FFMA R39, R47, R67, R28 ;
        /*46c0*/                   FFMA R38, R47.reuse, R66, R78 ;
        /*46d0*/                   FFMA R37, R46, R65, R77 ;
        /*65f0*/                   BRA.U !UP0, `(.L_x_14) ;
.L_x_13:
        /*6600*/                   DEPBAR.LE SB0, 0x0 ;
.L_x_16:
        /*6610*/                   HMMA.16816.F32.BF16 R4, R48, R8.reuse, R4 ;
        /*6620*/               @P0 BRA `(.L_x_16) ;
        /*6630*/                   EXIT ;
.L_x_17:
        /*6640*/                   BRA `(.L_x_17);
.L_x_448:
//--------------------- .text._Zsum --------------------------
.text._Zsum:
_Zsum:
        /*0000*/                   LDG.E R2, [R2.64] ;
        /*0010*/                   EXIT ;
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Zdecode:
  REG:168 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:712 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Zsum:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_instructions_and_the_main_loop():
    code = read_code(LISTING)
    assert set(code) == {"_Zdecode", "_Zsum"}
    counts = code["_Zdecode"].counts()
    assert counts["HMMA.16816.F32.BF16"] == 5
    assert (counts["LDGSTS.E.BYPASS.128"], counts["UIADD3"], counts["BRA.U"]) == (2, 1, 1)
    # Not the copy with as many products and more instructions, nor the loop with one product.
    assert code["_Zdecode"].main_loop() == Loop(instructions=7, products=2)
    assert code["_Zsum"].instructions == ["LDG.E", "EXIT"]
    assert code["_Zsum"].main_loop() is None


def test_a_loop_around_the_main_loop_is_not_it():
    lines = [
        "FADD R1 ;",
        ".L_x_2:",
        "HGMMA.64x16x16.F32 R4 ;",
        "@P0 BRA `(.L_x_2) ;",
        "HGMMA.64x16x16.F32 R4 ;",
    ]
    lines = [".L_x_1:", *lines, "@P1 BRA `(.L_x_1) ;"]
    text = "\n".join(line if line.startswith(".") else f"        /*0000*/   {line}" for line in lines)
    assert read_code(f".text._Z:\n{text}\n")["_Z"].main_loop() == Loop(instructions=2, products=1)


def test_what_a_launch_takes():
    usage = read_usage(USAGE)
    assert (usage["_Zdecode"].registers, usage["_Zdecode"].stack, usage["_Zdecode"].shared) == (168, 8, 1024)
    assert usage["_Zsum"].registers == 40


def test_names_have_the_enumerators_of_their_file(tmp_path):
    header, source = tmp_path / "status.h", tmp_path / "tile.cu"
    header.write_text(
        "enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1,\n  kFloat16 = 2,  // half\n};\n"
    )
    source.write_text("enum class Scaling { kSums, kWeights, kRagged };\n")
    enums = read_enums([header, source])
    space = "fastlora::cuda::(anonymous namespace)::"
    name = f"void {space}tile<(fastlora::DType)1, 12, ({space}Scaling)2, false>(fastlora::cuda::ProductArgs)"
    assert readable(name, enums) == "tile<kBFloat16, 12, kRagged, false>"
    assert readable(f"{space}lora_sum({space}SumArgs)", enums) == "lora_sum"


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("90a", 32, 256, 0, 8),  # threads
        ("86", 32, 256, 0, 6),
        ("86", 16, 32, 0, 16),  # blocks
        ("120", 16, 32, 0, 24),
        ("90a", 16, 32, 0, 32),
        ("90a", 168, 128, 74752, 3),  # both registers and shared memory: 12 warps, 3 times 74 KiB
        ("90a", 169, 128, 0, 2),  # 176 registers in steps: 11 warps, of which no quarter has three
        ("80", 168, 128, 74752, 2),
        ("89", 168, 128, 74752, 1),
        ("86", 64, 256, 101376, 1),  # all that a block may have
        ("86", 64, 256, 101377, 0),
        ("90a", 255, 512, 0, 0),  # more registers than there are
    ],
)
def test_blocks_of_a_processor(arch, registers, threads, shared, blocks):
    assert blocks_per_processor(arch, registers, threads, shared) == blocks


ROWS = [
    Row("tile<kBFloat16, 2>", "80", 100, 2, 14.0),
    Row("tile<kBFloat16, 2>", "90a", 100, 3, 14.5),
    Row("tile<kFloat16, 2>", "80", 102, 2, 14.1),  # within five percent
    Row("tile<kFloat16, 2>", "90a", 101, 3, 14.4),
    Row("decode<kBFloat16>", "80", 168, 2, 1.78, per_weight=True),
    Row("decode<kBFloat16>", "90a", 168, 3, 1.79, per_weight=True),
    Row("decode<kFloat16>", "80", 168, 1, 1.78, per_weight=True),  # fewer blocks
    Row("decode<kFloat16>", "90a", 168, 3, 1.79, per_weight=True),
    Row("sum", "80", 40, 6),
    Row("sum", "90a", 40, None),
]
TABLES = """
| kernel | sm_80 | sm_90a |
|---|--:|--:|
| `tile<kBFloat16, 2>` | 100, 2 | 100, 3 |
| `decode<kBFloat16>` | 168, 2 | 168, 3 |
| `decode<kFloat16>` | 168, 1 | 168, 3 |
| `sum` | 40, 6 | 40, - |

| main loop of | for each | sm_80 | sm_90a |
|---|---|--:|--:|
| `tile<kBFloat16, 2>` | product | 14.00 | 14.50 |
| `decode<kBFloat16>` | weight | 1.78 | 1.79 |
| `decode<kFloat16>` | weight | 1.78 | 1.79 |
""".strip()


def test_tables_are_read_as_they_are_written():
    assert text_of(ROWS) == TABLES
    record = recorded(f"text\n{BEGIN}\n{TABLES}\n{END}\ntext")
    assert record.blocks["tile<kBFloat16, 2>", "90a"] == 3
    assert ("sum", "90a") not in record.blocks
    assert record.loops["decode<kFloat16>", "80"] == 1.78
    assert losses(ROWS, record, 1.0) == []


def test_losses_are_named():
    record = recorded(f"{BEGIN}\n{TABLES}\n{END}")
    worse = [
        Row("sum", "80", 64, 4),
        Row("tile<kBFloat16, 2>", "90a", 90, 4, 16.7),
        Row("new", "80", 9, 1, 99.0),
    ]
    assert losses(worse, record, 1.15) == [
        "sum sm_80: 4 blocks a processor, cuda_kernels.md has 6",
        "tile<kBFloat16, 2> sm_90a: 16.70 instructions in the main loop for each product or weight, "
        "cuda_kernels.md has 14.50",
        "where that is meant: make cuda-check ARGS=--write",
    ]


def test_the_launches_of_every_kernel_are_listed_and_not_run():
    pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
    from _launches import launches_on

    launches = launches_on("90a")
    (decode,) = launches["nf4_linear_decode<kBFloat16, 2>"]
    assert (decode.threads, decode.grid) == (128, (8, 1, 1))
    assert decode.shared == 74752
    assert {"lora_sum", "split_sum<kFloat16, 1>", "quantize<kFloat32, kRagged>"} <= set(launches)
    # 96 rows at once: more shared memory than a block has on the small devices.
    wide = "nf4_linear_tile<kBFloat16, 12, kWeights>"
    assert wide in launches
    assert wide not in launches_on("86")
