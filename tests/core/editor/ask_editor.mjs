// Answers as VS Code's JSON editor would. In on stdin: {"schema": ..., "questions": [{"ask": ..., "text": ...}]};
// out on stdout: an answer for each. A text has a `|` where the cursor stands, except for "problems".
import { readFileSync } from "node:fs";
import service_package from "vscode-json-languageservice";

const { getLanguageService, TextDocument } = service_package;

const { schema, questions } = JSON.parse(readFileSync(0, "utf8"));
const service = getLanguageService({});
const uri = "file:///run_config.schema.json";
service.configure({ schemas: [{ uri, fileMatch: ["*.json"], schema }] });

function opened(text) {
  const document = TextDocument.create("file:///config.json", "json", 1, text);
  return [document, service.parseJSONDocument(document)];
}

function textOf(content) {
  if (content === undefined || content === null) return "";
  if (Array.isArray(content)) return content.map(textOf).join("\n");
  return typeof content === "string" ? content : content.value;
}

const answers = {
  async problems(text) {
    const [document, json] = opened(text);
    const found = await service.doValidation(document, json, { schemaValidation: "error" });
    return found.map(({ message, range }) => ({ message, line: range.start.line + 1 }));
  },
  async completions(text) {
    const offset = text.indexOf("|");
    const [document, json] = opened(text.slice(0, offset) + text.slice(offset + 1));
    const list = await service.doComplete(document, document.positionAt(offset), json);
    return list.items.map((item) => ({ label: item.label, about: textOf(item.documentation) }));
  },
  async hover(text) {
    const offset = text.indexOf("|");
    const [document, json] = opened(text.slice(0, offset) + text.slice(offset + 1));
    const hover = await service.doHover(document, document.positionAt(offset), json);
    return textOf(hover?.contents);
  },
};

const result = [];
for (const { ask, text } of questions) result.push(await answers[ask](text));
process.stdout.write(JSON.stringify(result));
