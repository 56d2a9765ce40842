"""What HLO text says, counted by hand; and what XLA makes of a scan, which its own analysis counts once."""

import jax
import jax.numpy as jnp
import pytest

from promot_jax.precompile import hlo

# A layer loop of 6 trips (0, 2, ... 10), each with a fused product, a slice of stacked weights, and collectives.
LOOP = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: bf16[12,8,16], p1: s32[], p2: bf16[4,8]) -> f32[4,16] {
  %p0 = bf16[12,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %p2 = bf16[4,8]{1,0} parameter(2)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %kernel = bf16[8,16]{1,0} bitcast(%slice)
  ROOT %product = f32[4,16]{1,0:T(8,128)} convolution(%p2, %kernel), dim_labels=bf_io->bf
}

%condition (state: (s32[], bf16[12,8,16], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (state: (s32[], bf16[12,8,16], bf16[4,8])) -> (s32[], bf16[12,8,16], bf16[4,8]) {
  %state = (s32[], bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %weights = bf16[12,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=2
  %y = f32[4,16]{1,0:T(8,128)S(1)} fusion(%weights, %i, %x), kind=kOutput, calls=%fused
  %all = f32[4,16]{1,0:T(8,128)S(1)} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%add
  %moved = f32[4,16]{1,0:T(8,128)S(1)} collective-permute(%all), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) tuple(%next, %weights, %x)
}

ENTRY %main (weights: bf16[12,8,16], x: bf16[4,8]) -> f32[16,8] {
  %weights = bf16[12,8,16]{2,1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %state = (s32[], bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) tuple(%start, %weights, %x)
  %loop = (s32[], bf16[12,8,16]{2,1,0}, bf16[4,8]{1,0}) while(%state), condition=%condition, body=%body
  %last = bf16[4,8]{1,0} get-tuple-element(%loop), index=2
  %wide = f32[4,8]{1,0} convert(%last)
  ROOT %gathered = f32[16,8]{1,0} all-gather(%wide), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    cost = hlo.Program(LOOP).cost

    assert cost.flops == 6 * 2 * 4 * 8 * 16
    assert cost.counts == {"all-reduce": 6, "collective-permute": 6, "all-gather": 1}
    # A ring of 4: an all-reduce sends 3/4 of the array twice, an all-gather its own part to 3 others.
    assert cost.collectives == {
        "all-reduce": 6 * 2 * 3 * 256 // 4,
        "collective-permute": 6 * 256,
        "all-gather": 3 * 128,
    }
    small = 6 * (4 + 4) + 7  # the counter's addition (read and written), and the comparison's result
    slices = 6 * (2 * 8 * 16 + 2 * 4 * 8 + 4)  # one layer's weights, never the stack; the product stays on the chip
    assert abs(cost.bytes - (slices + 64 + 128 + 128 + 512)) <= small + 6 * 4 + 7 * 8


def test_once_is_how_xla_counts():
    once = hlo.Program(LOOP, once=True).cost
    assert once.flops == 2 * 4 * 8 * 16 and once.counts["all-reduce"] == 1


def test_a_loop_whose_end_depends_on_data_takes_the_steps_given():
    text = LOOP.replace("ROOT %less = pred[] compare(%i, %end), direction=LT", "ROOT %less = pred[] custom-call(%i)")
    assert hlo.Program(text, steps=127).cost.flops == 127 * 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups=[32,4]<=[128]", 4),
        ("replica_groups=[4,32]<=[32,4]T(1,0)", 32),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['axis_0'=32,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=8] {'a','c'}", 16),
    ],
)
def test_groups_of_every_notation(groups, members):
    text = LOOP.replace("replica_groups=[2,4]<=[8]", groups)
    sent = hlo.Program(text).cost.collectives["all-reduce"]
    assert sent == pytest.approx(6 * 2 * 256 * (members - 1) / members)


def test_products_that_a_tpu_writes_as_convolutions():
    """Batched products as dilated windows, and an outer product as a padded one."""
    batched = (
        "  %lhs = bf16[2,16,612,64]{3,2,1,0} parameter(0)\n  %rhs = bf16[2,16,64,612]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[2,16,612,612]{3,2,1,0} convolution(%lhs, %rhs), window={size=2x16 stride=1x15 "
        "lhs_dilate=2x16}, dim_labels=01bf_01io->01bf\n"
    )
    padded = (
        "  %lhs = f32[16,32,1]{2,1,0} parameter(0)\n  %rhs = f32[612,612,32]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[16,612,612]{2,1,0} convolution(%lhs, %rhs), window={size=612 pad=611_611 rhs_reversal=1}, "
        "dim_labels=bf0_0oi->b0f\n"
    )
    for lines, flops in ((batched, 2 * 2 * 16 * 612 * 612 * 64), (padded, 2 * 16 * 32 * 612 * 612)):
        assert hlo.Program(f"ENTRY %main (a: f32[]) -> f32[] {{\n{lines}}}\n").cost.flops == flops


def test_products_of_attention_kernels_as_libtpu_names_them():
    """Of calls that XLA does not look into; other custom calls count nothing."""
    call = (
        "  %blocks = s8[1,2,2]{2,1,0} parameter(0)\n  %query = bf16[2,4,768,64]{3,2,1,0} parameter(1)\n"
        "  ROOT %NAME.2 = bf16[2,4,768,64]{3,2,1,0} custom-call(%blocks, %blocks, %query), "
        'custom_call_target="tpu_custom_call"\n'
    )
    for kernel, products in (("fwd", 2), ("dkv", 4), ("dq", 3)):
        lines = call.replace("NAME", f"splash_mha_{kernel}_segmented_no_residuals")
        cost = hlo.Program(f"ENTRY %main (a: f32[]) -> f32[] {{\n{lines}}}\n").cost
        assert cost.kernel_flops == products * 2 * 2 * 4 * 768 * 768 * 64 and cost.flops == 0
        assert cost.bytes == 2 * 2 * 4 * 768 * 64 * 2 + 2 * 4
    cost = hlo.Program(f"ENTRY %main (a: f32[]) -> f32[] {{\n{call.replace('NAME', 'other')}}}\n").cost
    assert (cost.kernel_flops, cost.bytes) == (0, 0)


def test_a_scan_as_xla_compiles_it():
    def layers(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    shapes = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32), jax.ShapeDtypeStruct((8, 32), jnp.float32)
    compiled = jax.jit(jax.grad(layers)).lower(*shapes).compile()
    cost = hlo.Program(compiled.as_text()).cost

    assert cost.flops == 3 * 5 * 2 * 8 * 32 * 32  # forward, and two products backward
    once = hlo.Program(compiled.as_text(), once=True).cost.flops
    assert once < cost.flops / 4 and once <= compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("kind", "slices", "share"),
    [
        ("ALL_REDUCE", "{1,2}", 1.0),
        ("ALL_REDUCE", "{1:4}", 1.5),
        ("ALL_GATHER", "{1:4}", 3.0),
        ("ONE_TO_ONE", "{1,2}", 1.0),
    ],
)
def test_what_is_sent_to_other_slices_as_libtpu_writes_it(kind, slices, share):
    program = f"""\
HloModule jit_step

ENTRY %main (x: f32[72,8,128]) -> f32[72,8,128] {{
  %x = f32[72,8,128]{{2,1,0:T(8,128)}} parameter(0)
  %token = token[] after-all()
  %send = (f32[72,8,128]{{2,1,0:T(8,128)}}, u32[], token[]) send(%x, %token), channel_id=18, is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{slices}x{{0:7}}",_xla_megascale_transfer_type="{kind}"}}
  %sent = token[] send-done(%send), channel_id=18, is_host_transfer=true
  ROOT %y = f32[72,8,128]{{2,1,0:T(8,128)}} copy(%x)
}}
"""
    assert hlo.Program(program).cost.network == share * 72 * 8 * 128 * 4
    assert hlo.Program(program.replace("_xla_megascale_target", "_xla_other")).cost.network == 0
