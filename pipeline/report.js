"use strict";
const PAGE = 50, PRINTED = 500;

/** What a text is sorted by: without case, accents apart, numbers by their value. Far faster than a collator. */
const sortKey = text => text.normalize("NFKD").toLowerCase().replace(/\d+/g, digits => digits.padStart(12, "0"));

/** Columns packed by pipeline/report_tables.py: base64 of gzip of JSON. */
async function unpack(text) {
  const raw = atob(text.trim()), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const {rows, columns} = await new Response(stream).json();
  for (const column of columns)
    if (!column.words) column.values = Float64Array.from(column.values, v => v === null ? NaN : v);
  return {rows, columns};
}

/** Columns of a table whose rows are all in the page. */
function readRows(nodes, heads) {
  const columns = heads.map((head, c) => {
    const cells = nodes.map(row => row.cells[c]);
    const column = {key: head.dataset.key || ""};
    if (cells.some(cell => cell.dataset.v !== undefined))
      column.values = Float64Array.from(cells, cell => cell.dataset.v === undefined ? NaN : +cell.dataset.v);
    else {
      column.words = cells.map(cell => cell.textContent);
      column.values = cells.map((_, i) => i);
    }
    return column;
  });
  return {rows: nodes.length, columns};
}

class Grid {
  constructor(box) {
    this.box = box;
    this.table = box.querySelector("table");
    this.body = this.table.tBodies[0];
    this.heads = [...this.table.tHead.rows[0].cells];
    this.input = box.querySelector("input[type=search]");
    this.count = box.querySelector(".count");
    this.pager = box.querySelector(".pager");
    this.page = 0;
    this.printing = false;
  }

  async load() {
    const pack = this.box.querySelector("script[data-pack]");
    if (!pack) {
      this.nodes = [...this.body.rows];
      this.data = readRows(this.nodes, this.heads);
    } else {
      try {
        this.data = await unpack(pack.textContent);
      } catch (error) {
        this.count.textContent = `Only the rows shown can be read by this browser: ${error.message}`;
        return;
      }
    }
    this.order = Uint32Array.from({length: this.data.rows}, (_, i) => i);
    this.whole = this.order;
    this.listen();
    this.box.dataset.ready = "";
  }

  listen() {
    this.heads.forEach((head, c) => head.querySelector("button").addEventListener("click", () => this.sort(c)));
    if (this.input) this.input.addEventListener("input", () => this.filter());
    for (const chip of this.box.querySelectorAll("button[data-query]"))
      chip.addEventListener("click", () => {
        this.input.value = this.input.value === chip.dataset.query ? "" : chip.dataset.query;
        this.filter();
      });
    if (this.pager) for (const button of this.pager.querySelectorAll("button"))
      button.addEventListener("click", () => {
        const last = this.pages() - 1;
        this.page = {first: 0, previous: this.page - 1, next: this.page + 1, last}[button.dataset.to];
        this.page = Math.max(0, Math.min(last, this.page));
        this.box.querySelector(".scroll").scrollTop = 0;
        this.draw();
      });
  }

  pages() {
    return Math.max(1, Math.ceil(this.order.length / PAGE));
  }

  sort(c) {
    const head = this.heads[c], down = head.getAttribute("aria-sort") === "ascending";
    for (const other of this.heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const {words, values} = this.data.columns[c];
    let keys = values;
    if (words) {
      const ranks = new Float64Array(words.length), texts = words.map(sortKey);
      [...words.keys()].sort((a, b) => texts[a] < texts[b] ? -1 : +(texts[a] > texts[b]))
        .forEach((word, rank) => { ranks[word] = words[word] === "" ? NaN : rank; });
      keys = Float64Array.from(values, word => ranks[word]);
    }
    const sign = down ? -1 : 1;
    this.whole = Uint32Array.from(this.whole).sort((a, b) => {
      const x = keys[a], y = keys[b];
      return x !== x || y !== y ? (x !== x) - (y !== y) : sign * (x - y);
    });
    this.filter();
  }

  filter() {
    const query = this.input ? this.input.value : "";
    const tests = (query.toLowerCase().match(/\S+/g) || []).map(word => this.test(word));
    this.order = tests.length ? this.whole.filter(row => tests.every(test => test(row))) : this.whole;
    for (const chip of this.box.querySelectorAll("button[data-query]"))
      chip.setAttribute("aria-pressed", String(chip.dataset.query === query));
    this.page = 0;
    this.draw();
  }

  /** A word of the filter: a condition on a column of numbers, or text to be found in a column of texts. */
  test(word) {
    const [, key, sign, number] = /^([a-z_0-9]+)(<=|>=|<|>|=)(-?[\d.]+)$/.exec(word) || [];
    const column = key && this.data.columns.find(found => found.key === key && !found.words);
    if (column) {
      const bound = +number, {values} = column;
      return {
        "<": row => values[row] < bound, "<=": row => values[row] <= bound, "=": row => values[row] === bound,
        ">": row => values[row] > bound, ">=": row => values[row] >= bound,
      }[sign];
    }
    const texts = this.data.columns.filter(found => found.words)
      .map(({words, values}) => ({values, hits: words.map(text => text.toLowerCase().includes(word))}));
    return row => texts.some(({values, hits}) => hits[values[row]]);
  }

  draw() {
    const paged = this.pager && !this.printing;
    const start = paged ? this.page * PAGE : 0;
    const end = paged ? start + PAGE : this.pager ? PRINTED : this.order.length;
    const shown = this.order.subarray(start, end);
    this.body.replaceChildren(...Array.from(shown, row => this.nodes ? this.nodes[row] : this.build(row)));
    const total = this.order.length, all = this.data.rows;
    if (this.count)
      this.count.textContent = total < all ? `${total.toLocaleString("en")} of ${all.toLocaleString("en")} rows` : "";
    if (!this.pager) return;
    this.pager.querySelector(".place").textContent = total
      ? `${(start + 1).toLocaleString("en")} to ${Math.min(start + PAGE, total).toLocaleString("en")}`
        + ` of ${total.toLocaleString("en")}` : "no rows";
    for (const button of this.pager.querySelectorAll("button")) {
      const back = ["first", "previous"].includes(button.dataset.to);
      button.disabled = back ? this.page === 0 : this.page >= this.pages() - 1;
    }
  }

  build(row) {
    const line = document.createElement("tr");
    this.data.columns.forEach((column, c) => {
      const cell = document.createElement(c ? "td" : "th");
      if (!c) cell.scope = "row";
      const value = column.values[row];
      if (column.words) {
        cell.textContent = column.words[value];
        if (c) cell.className = column.wide ? "t w" : "t";
      } else {
        cell.className = "n";
        if (value === value) {
          cell.textContent = value.toFixed(column.digits);
          if (column.mark !== null && value >= column.mark) cell.classList.add("mark");
        }
      }
      line.append(cell);
    });
    return line;
  }

  print(printing) {
    if (!this.order || !this.pager || this.printing === printing) return;
    this.printing = printing;
    this.draw();
  }
}

const grids = [...document.querySelectorAll("[data-grid]")].map(box => new Grid(box));
Promise.all(grids.map(grid => grid.load())).then(() => {
  const onPaper = matchMedia("print");
  const details = [...document.querySelectorAll("section > details")];
  const turn = printing => {
    grids.forEach(grid => grid.print(printing));
    for (const found of details) {
      if (printing && !found.open) found.dataset.opened = "";
      if (printing || "opened" in found.dataset) found.open = printing;
      if (!printing) delete found.dataset.opened;
    }
  };
  onPaper.addEventListener("change", change => turn(change.matches));
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  turn(onPaper.matches);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
});
