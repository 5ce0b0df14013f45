/** JSON-RPC messages, as far as something of them is looked into here. */

export interface Message {
  jsonrpc: "2.0";
  id?: string | number | null;
  method?: string;
  // biome-ignore-start lint/suspicious/noExplicitAny: what passes through may be of any shape
  params?: any;
  result?: any;
  // biome-ignore-end lint/suspicious/noExplicitAny: see above
  error?: { code: number; message: string; data?: unknown };
}
