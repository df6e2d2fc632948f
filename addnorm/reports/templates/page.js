"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const button = document.getElementById("language");
  const words = {
    en: { PNG_ACTION: "Save as PNG", SVG_ACTION: "Save as SVG", CLICK_TO_VIEW_ACTIONS: "Save" },
    zh: { PNG_ACTION: "保存为 PNG", SVG_ACTION: "保存为 SVG", CLICK_TO_VIEW_ACTIONS: "保存" },
  };
  let turn = 0;
  let drawn = [];

  async function draw(lang) {
    const mine = ++turn;
    drawn.splice(0).forEach((result) => result.finalize());
    for (const [name, versions] of Object.entries(page.charts)) {
      const place = document.getElementById("chart-" + name);
      const { spec, datasets } = versions[lang];
      const own = structuredClone(spec);
      own.datasets = Object.fromEntries(datasets.map((key) => [key, page.datasets[key]]));
      const result = await vegaEmbed(place, own, {
        mode: "vega-lite",
        renderer: "svg",
        ast: true,
        actions: { export: true, source: false, compiled: false, editor: false },
        i18n: words[lang],
        downloadFileName: "addnorm-" + name,
      });
      if (mine !== turn) {
        result.finalize();
        return;
      }
      drawn.push(result);
    }
    root.dataset.drawn = lang;
  }

  function show(lang) {
    root.lang = lang === "zh" ? "zh-CN" : "en";
    delete root.dataset.drawn;
    document.title = document.querySelector('h1 [data-lang="' + lang + '"]').textContent;
    button.textContent = lang === "zh" ? "English" : "中文";
    button.lang = lang === "zh" ? "en" : "zh-CN";
    draw(lang).catch((error) => {
      root.dataset.drawn = "failed";
      console.error(error);
    });
  }

  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("main > details").forEach((part) => { part.open = true; });
  });
  button.addEventListener("click", () => show(root.lang === "en" ? "zh" : "en"));
  show(root.lang === "en" ? "en" : "zh");
})();
