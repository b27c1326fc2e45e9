// A service worker of the demo page. It passes the requests of pictures, films and sounds on to the node, and tells the page
// what the node has answered: the elements themselves do not say.
"use strict";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { request, clientId } = event;
  const asset = new URL(request.url).pathname.match(/\/api\/v1\/assets\/([^/]+)$/);
  // The page's own requests have no destination; the page sees their answers itself.
  if (asset && request.destination && request.mode === "cors") event.respondWith(passOn(request, clientId, decodeURIComponent(asset[1])));
});

async function passOn(request, clientId, id) {
  const started = performance.now();
  // Not from the browser's cache: the badge is to show the node.
  const answer = await fetch(request, { cache: "no-store" });
  const page = await self.clients.get(clientId);
  if (page) page.postMessage({
    id, kind: request.destination, range: request.headers.get("range") || "", status: answer.status,
    cache: answer.headers.get("x-cache"), source: answer.headers.get("x-data-source"),
    length: Number(answer.headers.get("content-length")) || 0, time: performance.now() - started,
  });
  return answer;
}
