"""Edge-MoE's reordered attention with single-pass softmax as Verilog: controller, lanes, testbench."""

from hw.fixed_plan import ACTIVATIONS
from hw.verilog import _fill
from ref.blocks.stream import BLOCK, attention_steps

_UNITS = """// Reordered attention: {N} tokens, head size {D}, {P} lanes; 32 bits, 22 after the point.
`ifdef SYNTHESIS
(* blackbox *) module exp_unit (input signed [33:0] a, output [31:0] y);
endmodule
`else
module exp_unit (input signed [33:0] a, output reg [31:0] y); // floor(e^a), a <= 0
  real x;
  always @* begin
    x = a;
    y = $rtoi($floor($exp(x / 4194304.0) * 4194304.0));
  end
endmodule
`endif

// Which key is read, which query enters: one key block and at most one query block a cycle.
module attention_control (input clk, input start, output reg busy, output reg [15:0] round,
                          output reg [15:0] key, output reg [7:0] part, output load, output [15:0] query);
  reg [31:0] left;
  initial begin
    busy = 0;
    round = 0;
    key = 0;
    part = 0;
    left = 0;
  end
  assign query = round * {P} + key;
  assign load = busy && key < {P} && query < {N};
  always @(posedge clk)
    if (start) begin
      busy <= 1;
      round <= 0;
      key <= 0;
      part <= 0;
      left <= {STEPS};
    end else if (busy) begin
      part <= part == {PARTS} - 1 ? 0 : part + 1;
      if (part == {PARTS} - 1) begin
        key <= key == {N} - 1 ? 0 : key + 1;
        if (key == {N} - 1) round <= round + 1;
        left <= left - 1;
        if (left == 1) busy <= 0;
      end
    end
endmodule

// Scores of one resident query: eight products a cycle, floored, scaled by block; maximum and sum follow.
module score_lane (input clk, input en, input load, input [7:0] part, input [255:0] q_in,
                   input [255:0] k_in, output signed [31:0] logit, output signed [31:0] m_next,
                   output signed [31:0] s_next);
  reg [255:0] held [0:{PARTS}-1];
  reg signed [31:0] acc, m, s;
  wire [255:0] q = load ? q_in : held[part];
  wire signed [63:0] product [0:7];
  genvar i;
  generate
    for (i = 0; i < 8; i = i + 1)
      assign product[i] = ($signed(q[32 * i +: 32]) * $signed(k_in[32 * i +: 32])) >>> 22;
  endgenerate
  wire signed [31:0] sum = product[0] + product[1] + product[2] + product[3] + product[4] + product[5]
                           + product[6] + product[7];
  wire signed [63:0] scaled = (sum * 64'sd{SCALE}) >>> 22;
  assign logit = (part == 0 ? 32'sd0 : acc) + scaled[31:0];
  wire signed [31:0] m_old = load ? 32'sh80000000 : m, s_old = load ? 32'sd0 : s;
  wire signed [33:0] apart = logit - m_old;
  wire larger = logit > m_old;
  wire [31:0] e;
  exp_unit exponential (.a(larger ? -apart : apart), .y(e));
  wire signed [63:0] kept = (s_old * $signed({1'b0, e})) >>> 22;
  assign m_next = larger ? logit : m_old;
  assign s_next = larger ? kept[31:0] + 32'sd4194304 : s_old + $signed(e);
  always @(posedge clk)
    if (en) begin
      if (load) held[part] <= q_in;
      acc <= logit;
      if (part == {PARTS} - 1) begin
        m <= m_next;
        s <= s_next;
      end
    end
endmodule

// One query's weighted sum of values, eight numbers a cycle.
module value_lane (input clk, input en, input load, input [7:0] part, input signed [31:0] logit,
                   input signed [31:0] m, input signed [31:0] recip, input [255:0] v_in,
                   output [255:0] out);
  reg [255:0] acc [0:{PARTS}-1];
  reg signed [31:0] held;
  wire [31:0] e;
  wire signed [33:0] apart = logit - m;
  exp_unit exponential (.a(apart), .y(e));
  wire signed [63:0] weight = ($signed({1'b0, e}) * recip) >>> 22;
  wire signed [31:0] p = part == 0 ? weight[31:0] : held;
  wire [255:0] old = load ? 256'd0 : acc[part];
  genvar i;
  generate
    for (i = 0; i < 8; i = i + 1) begin : number
      wire signed [63:0] product = (p * $signed(v_in[32 * i +: 32])) >>> 22;
      assign out[32 * i +: 32] = old[32 * i +: 32] + product[31:0];
    end
  endgenerate
  always @(posedge clk)
    if (en) begin
      acc[part] <= out;
      held <= p;
    end
endmodule
"""

_BENCH = """
`ifndef SYNTHESIS
module testbench;
  reg clk = 0, start = 0, values = 0;
  reg [255:0] q_mem [0:{N}*{PARTS}-1], k_mem [0:{N}*{PARTS}-1], v_mem [0:{N}*{PARTS}-1];
  reg [255:0] o_mem [0:{N}*{PARTS}-1];
  reg signed [31:0] logit_mem [0:{N}*{N}-1], m_mem [0:{N}-1], s_mem [0:{N}-1], r_mem [0:{N}-1];
  wire busy, load;
  wire [15:0] round, key, query;
  wire [7:0] part;
  attention_control control (.clk(clk), .start(start), .busy(busy), .round(round), .key(key), .part(part),
                             .load(load), .query(query));
  wire [255:0] q_block = load ? q_mem[query * {PARTS} + part] : 256'd0;
  wire [255:0] k_block = k_mem[key * {PARTS} + part], v_block = v_mem[key * {PARTS} + part];
  integer cycles = 0, keys = 0, queries = 0, n, i;
  genvar j;
  generate
    for (j = 0; j < {P}; j = j + 1) begin : lane
      wire late = key < j; // still at the query of the round before
      wire [15:0] mine = (late ? round - 1 : round) * {P} + j;
      wire en = busy && (late ? round > 0 : 1) && mine < {N};
      wire first = en && key == j;
      wire last = en && key == (j == 0 ? {N} - 1 : j - 1);
      wire signed [31:0] logit, m_next, s_next;
      wire [255:0] out;
      score_lane scores (.clk(clk), .en(en && !values), .load(first), .part(part), .q_in(q_block),
                         .k_in(k_block), .logit(logit), .m_next(m_next), .s_next(s_next));
      value_lane sums (.clk(clk), .en(en && values), .load(first), .part(part),
                       .logit(logit_mem[mine * {N} + key]), .m(m_mem[mine]), .recip(r_mem[mine]),
                       .v_in(v_block), .out(out));
      always @(posedge clk) begin
        if (en && !values && part == {PARTS} - 1) begin
          logit_mem[mine * {N} + key] <= logit;
          if (last) begin
            m_mem[mine] <= m_next;
            s_mem[mine] <= s_next;
          end
        end
        if (last && values) o_mem[mine * {PARTS} + part] <= out;
      end
    end
  endgenerate
  always #1 clk = ~clk;
  always @(posedge clk)
    if (busy) begin
      cycles <= cycles + 1;
      if (part == 0 && !values) keys <= keys + 1;
      if (part == 0 && !values && load) queries <= queries + 1;
    end
  initial begin
    $readmemh("q.hex", q_mem);
    $readmemh("k.hex", k_mem);
    $readmemh("v.hex", v_mem);
    @(negedge clk) start = 1;
    @(negedge clk) start = 0;
    wait (!busy);
    @(negedge clk) values = 1;
    for (n = 0; n < {N}; n = n + 1) r_mem[n] = 64'sd17592186044416 / s_mem[n]; // the reciprocal unit
    @(negedge clk) start = 1;
    @(negedge clk) start = 0;
    wait (!busy);
    @(negedge clk) $display("%0d %0d %0d", cycles, keys, queries);
    for (n = 0; n < {N}; n = n + 1) $display("%0d %0d", m_mem[n], r_mem[n]);
    for (n = 0; n < {N} * {PARTS}; n = n + 1)
      for (i = 0; i < 8; i = i + 1) $display("%0d", $signed(o_mem[n][32 * i +: 32]));
    $finish;
  end
endmodule
`endif
"""


def emit_attention_verilog(target, n, d) -> str:
    """Controller, score lanes with single-pass softmax and value lanes of one head, and a testbench.

    n tokens, head size d, scale d^-1/2 floored to a step, the target's attn_parallel lanes. The testbench
    reads q.hex, k.hex and v.hex (a line of 8 numbers, see `block_lines`) and prints cycles, key and query
    loads, then maximum and reciprocal of every query, then the result. Exponentials are a unit of their own,
    a black box to synthesis.
    Raises: ValueError unless lanes < n, d is a multiple of 8, and activations are <32, 10> on 256 bit ports.
    """
    lanes = target.attn_parallel
    if target.formats.activations != ACTIVATIONS or target.lanes != BLOCK:
        raise ValueError(f"only {ACTIVATIONS.name} activations on ports of 256 bits are emitted")
    if not 1 <= lanes < n:
        raise ValueError(f"attn_parallel must be in 1..{n - 1}, fewer than the tokens, got {lanes}")
    if d < BLOCK or d % BLOCK:
        raise ValueError(f"d must be a multiple of {BLOCK}, got {d}")
    names = {
        "N": n, "D": d, "P": lanes, "PARTS": d // BLOCK, "STEPS": attention_steps(n, n, parallel=lanes),
        "SCALE": int(d**-0.5 * 2**22),
    }  # fmt: skip
    return _fill(_UNITS + _BENCH, names)


def block_lines(rows) -> str:
    """Integers [n, d] as $readmemh reads blocks of 8 numbers of 32 bits, the first in the low bits."""
    out = []
    for row in rows:
        for at in range(0, len(row), BLOCK):
            out.append("".join(f"{int(x) & 0xFFFFFFFF:08x}" for x in reversed(row[at : at + BLOCK])) + "\n")
    return "".join(out)
