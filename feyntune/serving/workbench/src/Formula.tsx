import katex from "katex";
import { useLayoutEffect, useRef } from "preact/hooks";

interface TreeNode {
  attributes?: Record<string, string>;
  children?: TreeNode[];
  toNode(): Node;
}
// Not in KaTeX's types, which is why its version is pinned. Unlike katex.render it lets us see the tree first.
const toTree = (katex as unknown as { __renderToDomTree(tex: string, options: katex.KatexOptions): TreeNode })
  .__renderToDomTree;

const OPTIONS: katex.KatexOptions = {
  displayMode: false,
  throwOnError: true,
  strict: "ignore",
  trust: false, // a model may write \href and \includegraphics
  maxSize: 10,
  maxExpand: 200,
};

/** A formula set by KaTeX; its source where KaTeX cannot read it. */
export function Formula({ tex, source, display }: { tex: string; source: string; display: boolean }) {
  const place = useRef<HTMLSpanElement>(null);
  useLayoutEffect(() => {
    try {
      place.current!.replaceChildren(set(tex, display));
    } catch {
      place.current!.replaceChildren(source);
    }
  }, [tex, source, display]);
  return <span class="tex" ref={place} />;
}

/**
 * Style attributes are what the Content-Security-Policy forbids, styles set by a script are not. KaTeX sets an
 * attribute only for the width of a drawn sign; anything else it would put there can go.
 */
function set(tex: string, display: boolean): Node {
  const tree = toTree(tex, { ...OPTIONS, displayMode: display });
  move(tree);
  const holder = document.createElement("span");
  holder.append(tree.toNode());
  for (const sign of holder.querySelectorAll<SVGElement>("svg[data-width]")) sign.style.width = sign.dataset.width!;
  return holder;
}

function move(node: TreeNode) {
  const style = node.attributes?.style;
  if (style !== undefined) {
    if (style.startsWith("width:")) node.attributes!["data-width"] = style.slice("width:".length);
    delete node.attributes!.style;
  }
  node.children?.forEach(move);
}
