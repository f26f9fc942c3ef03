// SVG to PNG with resvg, a program without dependencies.
// node rasterize.js RESVG_FOLDER PIXELS < {"name": "<svg…>"} > {"name": "base64 of a PNG"}
const fs = require("fs");
const path = require("path");

const [folder, pixels] = process.argv.slice(2);
const { initWasm, Resvg } = require(path.resolve(folder, "index.js"));

async function main() {
  await initWasm(fs.readFileSync(path.join(folder, "index_bg.wasm")));
  const drawings = JSON.parse(fs.readFileSync(0, "utf8"));
  const options = { background: "white", fitTo: { mode: "width", value: Number(pixels) } };
  const images = Object.entries(drawings).map(([name, svg]) => {
    const png = new Resvg(svg, options).render().asPng();
    return [name, Buffer.from(png).toString("base64")];
  });
  process.stdout.write(JSON.stringify(Object.fromEntries(images)));
}

main();
