"""Edge-MoE's unified linear unit as Verilog: one block of products a cycle, four flags, and a testbench."""

from hw.fixed_plan import ACTIVATIONS, BIASES, WEIGHTS
from hw.program import Tensor
from hw.verilog import _fill
from ref.blocks.fixed_ops import gelu_table
from ref.blocks.stream import linear_cycles

_UNITS = """// {I} x {O} products a cycle: activations <32, 10>, weights <16, 2>, biases <16, 5>.
module gelu_unit (input signed [31:0] x, output signed [31:0] y); // ReLU less a table of 177 numbers
  reg [21:0] low, high;
  wire [31:0] size = x < 0 ? -x : x;
  wire [14:0] at = size[31:17];
  wire [21:0] t = {size[16:0], 5'd0};
  always @* begin
    low = 0;
    high = 0;
    case (at)
{CASES}
    endcase
  end
  wire signed [46:0] slope = ($signed({1'b0, high}) - $signed({1'b0, low})) * $signed({1'b0, t});
  wire signed [46:0] delta = (($signed({1'b0, low}) <<< 22) + slope) >>> 22;
  assign y = (x < 0 ? 32'sd0 : x) - (at < 176 ? delta[31:0] : 32'sd0);
endmodule

// first: the first block of inputs of an output. scored: times a score, added to the old value.
module linear_unit (input clk, input en, input first, input gelu, input scored, input signed [31:0] score,
                    input [{I}*32-1:0] x, input [{I}*{O}*16-1:0] w, input [{O}*16-1:0] bias,
                    input [{O}*32-1:0] old, output [{O}*32-1:0] out);
  genvar o;
  generate
    for (o = 0; o < {O}; o = o + 1) begin : output_lane
      reg signed [31:0] acc, sum;
      reg signed [47:0] product;
      integer i;
      always @* begin
        sum = first ? $signed(bias[o * 16 +: 16]) <<< 11 : acc;
        product = 0;
        for (i = 0; i < {I}; i = i + 1) begin
          product = ($signed(x[i * 32 +: 32]) * $signed(w[(o * {I} + i) * 16 +: 16])) >>> 14;
          sum = sum + product[31:0];
        end
      end
      always @(posedge clk) if (en) acc <= sum;
      wire signed [31:0] bent;
      gelu_unit table_unit (.x(sum), .y(bent));
      wire signed [31:0] shown = gelu ? bent : sum;
      wire signed [63:0] weighed = (shown * score) >>> 22;
      assign out[o * 32 +: 32] = scored ? old[o * 32 +: 32] + weighed[31:0] : shown;
    end
  endgenerate
endmodule
"""

_BENCH = """
`ifndef SYNTHESIS
module testbench;
  reg clk = 0, busy = 0;
  reg [{I}*32-1:0] x_mem [0:{TOKENS}*{PIN}-1];
  reg [{I}*{O}*16-1:0] w_mem [0:{POUT}*{PIN}-1];
  reg [{O}*16-1:0] b_mem [0:{POUT}-1];
  reg [{O}*32-1:0] o_mem [0:{TOKENS}*{POUT}-1];
  reg [31:0] queue [0:{ROWS}-1];
  reg signed [31:0] scores [0:{ROWS}-1];
  integer row = 0, from_in = 0, to_out = 0, cycles = 0, n, i;
  wire [31:0] token = queue[row];
  wire [{O}*32-1:0] out;
  linear_unit unit (.clk(clk), .en(busy), .first(from_in == 0), .gelu(1'b{GELU}), .scored(1'b{SCORED}),
                    .score(scores[row]), .x(x_mem[token * {PIN} + from_in]),
                    .w(w_mem[to_out * {PIN} + from_in]), .bias(b_mem[to_out]),
                    .old(o_mem[token * {POUT} + to_out]), .out(out));
  always #1 clk = ~clk;
  always @(posedge clk)
    if (busy) begin
      cycles <= cycles + 1;
      from_in <= from_in == {PIN} - 1 ? 0 : from_in + 1;
      if (from_in == {PIN} - 1) begin
        o_mem[token * {POUT} + to_out] <= out;
        to_out <= to_out == {POUT} - 1 ? 0 : to_out + 1;
        if (to_out == {POUT} - 1) row <= row + 1;
        if (to_out == {POUT} - 1 && row == {ROWS} - 1) busy <= 0;
      end
    end
  initial begin
    $readmemh("x.hex", x_mem);
    $readmemh("w.hex", w_mem);
    $readmemh("b.hex", b_mem);
    $readmemh("queue.hex", queue);
    $readmemh("scores.hex", scores);
    for (n = 0; n < {TOKENS} * {POUT}; n = n + 1) o_mem[n] = 0;
    @(negedge clk) busy = 1;
    wait (!busy);
    @(negedge clk) $display("%0d", cycles);
    for (n = 0; n < {TOKENS} * {POUT}; n = n + 1)
      for (i = 0; i < {O}; i = i + 1) $display("%0d", $signed(o_mem[n][32 * i +: 32]));
    $finish;
  end
endmodule
`endif
"""


def emit_linear_verilog(target, tokens, n_in, n_out, *, rows=None, gelu=False, scored=False) -> str:
    """The unit of linear_in x linear_out products, and a testbench that runs x [tokens, n_in] through it.

    rows: how many tokens queue.hex names (None: tokens). gelu, scored: flags of the unit. The testbench
    reads x.hex, w.hex, b.hex, queue.hex and scores.hex (`linear_files`) and prints the cycles and the result,
    a row for each token, zeros where none was queued, outputs padded to a multiple of linear_out.
    Raises: ValueError unless the formats are Edge-MoE's, biases' too, or for a size below 1.
    """
    rows = tokens if rows is None else rows
    of = {"activations": ((2, 2), "activation"), "weights": ((2, 2), "weight"), "biases": ((2,), "weight")}
    got = {n: target.formats.format(Tensor(-1, shape, "float32", role)) for n, (shape, role) in of.items()}
    wanted = {"activations": ACTIVATIONS, "weights": WEIGHTS, "biases": BIASES}
    for name, f in got.items():
        if f != wanted[name]:
            all_three = ", ".join(f"{w.name} {n}" for n, w in wanted.items())
            raise ValueError(f"only {all_three} are emitted, got {f.name} {name}")
    if min(rows, tokens) < 1:
        raise ValueError(f"tokens and rows must be positive, got {tokens} and {rows}")
    i, o = target.linear_in, target.linear_out
    linear_cycles(tokens, n_in, n_out, linear_in=i, linear_out=o)  # checks the sizes
    t = gelu_table()
    cases = "\n".join(f"      {n}: begin low = {t[n]}; high = {t[n + 1]}; end" for n in range(len(t) - 1))
    names = {
        "I": i, "O": o, "TOKENS": tokens, "ROWS": rows, "PIN": -(-n_in // i), "POUT": -(-n_out // o),
        "GELU": int(gelu), "SCORED": int(scored), "CASES": cases,
    }  # fmt: skip
    return _fill(_UNITS + _BENCH, names)


def linear_files(target, x, w, b, *, queue=None, scores=None) -> dict[str, str]:
    """{file name: text} for the testbench: x [N, K], w [M, K], b [M], queue [n], scores [n], integers."""
    i, o = target.linear_in, target.linear_out
    up = lambda n, to: -(-n // to) * to
    zero = lambda rows, n: [[int(v) for v in r] + [0] * (n - len(r)) for r in rows]
    k, m = up(len(x[0]), i), up(len(w), o)
    x, w = zero(x, k), zero(w, k)
    w += [[0] * k for _ in range(m - len(w))]
    (b,) = zero([b], m)
    queue = range(len(x)) if queue is None else queue
    scores = [0] * len(queue) if scores is None else scores
    word = lambda numbers, bits: "".join(
        f"{v & ((1 << bits) - 1):0{bits // 4}x}" for v in reversed(list(numbers))
    )
    blocks = lambda n, size: range(0, n, size)
    return {
        "x.hex": "".join(word(r[at : at + i], 32) + "\n" for r in x for at in blocks(k, i)),
        "w.hex": "".join(
            word([v for r in w[to : to + o] for v in r[at : at + i]], 16) + "\n"
            for to in blocks(m, o)
            for at in blocks(k, i)
        ),
        "b.hex": "".join(word(b[to : to + o], 16) + "\n" for to in blocks(m, o)),
        "queue.hex": "".join(f"{int(q):x}\n" for q in queue),
        "scores.hex": "".join(word([int(s)], 32) + "\n" for s in scores),
    }
