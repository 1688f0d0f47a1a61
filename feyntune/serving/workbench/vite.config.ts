import { defineConfig, type Plugin } from "vite";

// KaTeX's style sheet names each font three times; every browser that runs this page reads woff2. Formulas are shown
// in another font while theirs load, not hidden.
const katexFonts: Plugin = {
  name: "katex-fonts",
  enforce: "pre",
  transform: (code, id) =>
    id.includes("katex") && id.endsWith(".css")
      ? code
          .replace(/,url\([^)]*\.(woff|ttf)\) ?format\("\w+"\)/g, "")
          .replace(/font-display:block/g, "font-display:swap")
      : null,
};

export default defineConfig({
  base: "./", // the page works below any path of a proxy
  plugins: [katexFonts],
  build: {
    outDir: "../page",
    emptyOutDir: true,
    assetsDir: "workbench", // what feyntune/serving/workbench.py serves, each file under a name that holds its hash
    assetsInlineLimit: 0, // no data: addresses, which the Content-Security-Policy refuses
    modulePreload: { polyfill: false },
    license: { fileName: "workbench/LICENSES.md" },
  },
});
