"""Designs as Verilog, from the same fields that price them: an output-stationary array and its controller."""

from hw.systolic import _check

_ARRAY = """// An output-stationary array of {R} x {C} cells: {A} by {B} bit operands, {ACC} bit sums.
module cell_os (input clk, input first, input signed [{A}-1:0] a, input signed [{B}-1:0] b,
                output reg signed [{A}-1:0] a_out, output reg signed [{B}-1:0] b_out,
                output reg signed [{ACC}-1:0] sum);
  initial begin
    a_out = 0;
    b_out = 0;
    sum = 0;
  end
  always @(posedge clk) begin
    a_out <= a;
    b_out <= b;
    sum <= (first ? {ACC}'sd0 : sum) + a * b;
  end
endmodule

// a: a number for each row, b: for each column, already skewed; first: the first cycle of a fold.
module systolic_array (input clk, input first, input [{R}*{A}-1:0] a, input [{C}*{B}-1:0] b,
                       output [{R}*{C}*{ACC}-1:0] sums);
  wire signed [{A}-1:0] right [0:{R}*({C}+1)-1];
  wire signed [{B}-1:0] down [0:({R}+1)*{C}-1];
  genvar i, j;
  generate
    for (i = 0; i < {R}; i = i + 1) assign right[i * ({C} + 1)] = a[i * {A} +: {A}];
    for (j = 0; j < {C}; j = j + 1) assign down[j] = b[j * {B} +: {B}];
    for (i = 0; i < {R}; i = i + 1)
      for (j = 0; j < {C}; j = j + 1)
        cell_os cell_ij (.clk(clk), .first(first), .a(right[i * ({C} + 1) + j]), .b(down[i * {C} + j]),
                         .a_out(right[i * ({C} + 1) + j + 1]), .b_out(down[(i + 1) * {C} + j]),
                         .sum(sums[(i * {C} + j) * {ACC} +: {ACC}]));
  endgenerate
endmodule
"""

_FEED = """
`ifndef SYNTHESIS
// Folds of a [{M}, {K}] b [{K}, {N}]: which numbers enter in which cycle. Memories are behavioural.
module systolic (input clk, input start, output reg done, output reg [63:0] cycles);
  localparam DOWN = ({M} + {R} - 1) / {R}, RIGHT = ({N} + {C} - 1) / {C}, PER_FOLD = {PER_FOLD};
  reg signed [{A}-1:0] a_mem [0:{M}*{K}-1];
  reg signed [{B}-1:0] b_mem [0:{K}*{N}-1];
  reg signed [{ACC}-1:0] c_mem [0:{M}*{N}-1];
  reg [{R}*{A}-1:0] a;
  reg [{C}*{B}-1:0] b;
  wire [{R}*{C}*{ACC}-1:0] sums;
  reg running;
  integer t, fold_i, fold_j, i, j, row, col, at;
  systolic_array grid (.clk(clk), .first(t == 0), .a(a), .b(b), .sums(sums));

  always @* begin
    a = 0;
    b = 0;
    for (i = 0; i < {R}; i = i + 1) begin
      at = t - i;
      row = fold_i * {R} + i;
      if (running && at >= 0 && at < {K} && row < {M}) a[i * {A} +: {A}] = a_mem[row * {K} + at];
    end
    for (j = 0; j < {C}; j = j + 1) begin
      at = t - j;
      col = fold_j * {C} + j;
      if (running && at >= 0 && at < {K} && col < {N}) b[j * {B} +: {B}] = b_mem[at * {N} + col];
    end
  end

  reg keep;
  integer keep_i, keep_j, ki, kj;
  initial begin
    running = 0;
    done = 0;
    keep = 0;
    cycles = 0;
    t = 0;
    fold_i = 0;
    fold_j = 0;
  end
  always @(posedge clk) begin
    if (start) running <= 1;
    if (running) begin
      cycles <= cycles + 1;
      t <= t == PER_FOLD - 1 ? 0 : t + 1;
      if (t == PER_FOLD - 1) begin
        keep <= 1;
        keep_i <= fold_i;
        keep_j <= fold_j;
        fold_j <= fold_j == RIGHT - 1 ? 0 : fold_j + 1;
        if (fold_j == RIGHT - 1) fold_i <= fold_i + 1;
        if (fold_j == RIGHT - 1 && fold_i == DOWN - 1) running <= 0;
      end else keep <= 0;
    end else keep <= 0;
    if (keep) begin // sums of the last fold, before the next one's second cycle
      for (ki = 0; ki < {R}; ki = ki + 1)
        for (kj = 0; kj < {C}; kj = kj + 1)
          if (keep_i * {R} + ki < {M} && keep_j * {C} + kj < {N})
            c_mem[(keep_i * {R} + ki) * {N} + keep_j * {C} + kj] <= sums[(ki * {C} + kj) * {ACC} +: {ACC}];
      done <= !running;
    end
  end
endmodule

module testbench;
  reg clk = 0, start = 0;
  wire done;
  wire [63:0] cycles;
  integer i;
  systolic machine (.clk(clk), .start(start), .done(done), .cycles(cycles));
  always #1 clk = ~clk;
  initial begin
    $readmemh("a.hex", machine.a_mem);
    $readmemh("b.hex", machine.b_mem);
    @(negedge clk) start = 1;
    @(negedge clk) start = 0;
    wait (done);
    $display("cycles %0d", cycles);
    for (i = 0; i < {M} * {N}; i = i + 1) $display("%0d", machine.c_mem[i]);
    $finish;
  end
endmodule
`endif
"""


def emit_systolic_verilog(target, m, n, k) -> str:
    """A `systolic_array` of rows x cols cells, its schedule for an [m, k] by [k, n] product, and a testbench.

    Operands have the bits of the target's activations and weights, sums as many as hold every sum of k
    products. The testbench reads a.hex and b.hex (`hex_lines`) and prints the cycles and the result.
    Raises: ValueError for a dataflow other than os.
    """
    _check(m, n, k, target.rows, target.cols, target.dataflow)
    if target.dataflow != "os":
        raise ValueError(f'only the dataflow "os" is emitted, got {target.dataflow!r}')
    names = {
        "M": m, "N": n, "K": k, "R": target.rows, "C": target.cols, "A": target.act_bits,
        "B": target.weight_bits, "ACC": target.act_bits + target.weight_bits + (k - 1).bit_length(),
        "PER_FOLD": target.rows + target.cols + k - 2 + (target.rows if target.drain else 0),
    }  # fmt: skip
    return _fill(_ARRAY, names) + _fill(_FEED, names)


def hex_lines(numbers, bits) -> str:
    """Integers as $readmemh reads them: two's complement of so many bits, one a line."""
    digits = -(-bits // 4)
    return "".join(f"{int(x) & ((1 << bits) - 1):0{digits}x}\n" for x in numbers)


def _fill(text, names):
    for name, value in names.items():
        text = text.replace("{" + name + "}", str(value))
    return text
