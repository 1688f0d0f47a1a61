import { lexer, type Token, type Tokens } from "marked";

/** Markdown as elements of this page, without its front matter. Never as HTML: what a card quotes is text. */
export function Markdown({ text }: { text: string }) {
  return <>{blocks(lexer(text.replace(/^---\n[^]*?\n---\n/, "")))}</>;
}

function blocks(tokens: Token[]) {
  return tokens.map((token, i) => {
    switch (token.type) {
      case "heading":
        return token.depth < 2 ? <h3 key={i}>{inline(token.tokens)}</h3> : <h4 key={i}>{inline(token.tokens)}</h4>;
      case "paragraph":
        return <p key={i}>{inline(token.tokens)}</p>;
      case "code":
        return <pre key={i}>{token.text}</pre>;
      case "list": {
        const items = (token as Tokens.List).items.map((item, j) => <li key={j}>{blocks(item.tokens)}</li>);
        return token.ordered ? <ol key={i}>{items}</ol> : <ul key={i}>{items}</ul>;
      }
      case "table": {
        const { header, rows } = token as Tokens.Table;
        return (
          <table key={i}>
            <thead>
              <tr>
                {header.map((cell, j) => (
                  <th key={j} scope="col">
                    {inline(cell.tokens)}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {rows.map((row, j) => (
                <tr key={j}>
                  {row.map((cell, k) => (
                    <td key={k}>{inline(cell.tokens)}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        );
      }
      case "space":
        return null;
      default:
        return <span key={i}>{"tokens" in token && token.tokens ? inline(token.tokens) : token.raw}</span>;
    }
  });
}

function inline(tokens: Token[] = []) {
  return tokens.map((token, i) => {
    switch (token.type) {
      case "strong":
        return <strong key={i}>{inline(token.tokens)}</strong>;
      case "em":
        return <em key={i}>{inline(token.tokens)}</em>;
      case "codespan":
        return <code key={i}>{token.text}</code>;
      case "br":
        return <br key={i} />;
      case "link":
        return /^https?:/.test(token.href) ? (
          <a key={i} href={token.href} rel="noreferrer">
            {inline(token.tokens)}
          </a>
        ) : (
          <span key={i}>{inline(token.tokens)}</span>
        );
      default:
        return <span key={i}>{"text" in token ? token.text : token.raw}</span>;
    }
  });
}
