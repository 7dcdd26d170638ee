// Drives the page in headless Chromium, as a user would. One line for each check; exit 1 when one fails.
// HELD and OWED are the origins of two relays (the test that starts this seeds them): one holds mail and
// can release it, the other wants TOKEN and is owed mail by a next hop that is busy at first. CHROMIUM is
// the browser. SHOTS is a directory for screenshots, in light and dark, or nothing; TERMINAL is then a text
// that is shown as a terminal's (see .ci/pictures).
import http from 'node:http';
import { chromium } from 'playwright-core';

const { HELD, OWED, TOKEN, CHROMIUM, SHOTS, TERMINAL } = process.env;
const args = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const browser = await chromium.launch({ executablePath: CHROMIUM, args });
let failed = 0;
const outside = [], strays = [], dialogs = [], errors = [], tabs = [];
const sleep = ms => new Promise(done => setTimeout(done, ms));

async function check(name, work) {
  const begun = Date.now();
  try {
    const value = await work();
    if (value === false) throw new Error('no');
    console.log(`ok   ${name} (${Date.now() - begun} ms)`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}: ${String(error.message).split('\n').slice(0, 4).join(' ')}`);
  }
}
async function until(test, what = test) {
  for (const end = Date.now() + 15000; ; await sleep(20)) {
    const value = await test();
    if (value) return value;
    if (Date.now() > end) throw new Error('did not happen: ' + what);
  }
}
const visible = locator => until(() => locator.isVisible(), locator);  // Playwright's own waits look twice a second only
async function send(origin, Subject, to = 'bob@example.com') {
  const headers = origin === OWED ? { Authorization: 'Bearer ' + TOKEN } : {};
  const body = { From: { Email: 'ann@example.com' }, To: [{ Email: to }], Subject, Text: 'Sent.', HTML: '<p>Sent.</p>' };
  const answer = await fetch(origin + '/api/v1/send', { method: 'POST', headers, body: JSON.stringify(body) });
  return (await answer.json()).ID;
}
async function newPage(options = {}, left = strays) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(15000);
  page.on('dialog', d => { dialogs.push(d.message()); d.dismiss(); });
  page.on('pageerror', e => errors.push(e.stack));
  page.on('popup', p => { tabs.push(p.url()); p.close(); });
  page.on('console', m => {
    const where = m.location().url || '';
    if (m.type() === 'error' && !/\/view\//.test(where + m.text())
      && !/ERR_|status of|evil|remote\.test|sandboxed|inline script/.test(m.text())) errors.push(m.text());
  });
  await context.route(url => ![HELD, OWED].includes(url.origin) && !['data:', 'blob:', 'about:'].includes(url.protocol),
    (route, request) => { left.push(request.url()); route.fulfill({ status: 200, body: '' }); });
  return page;
}
async function visit(page, hash = '', origin = HELD) {
  await page.goto(`${origin}/${hash}`);
  await visible(page.locator('#live.on'));
}
async function shoot(page, name) {
  for (const colorScheme of SHOTS ? ['dark', 'light'] : []) {
    await page.emulateMedia({ colorScheme });
    await sleep(50);
    await page.screenshot({ path: `${SHOTS}/${name}-${colorScheme}.png`, animations: 'disabled' });
  }
}
const text = (page, selector) => page.locator(selector).first().innerText();
const rowNamed = (page, words) => page.locator('.row', { hasText: words }).first();
async function seek(page, words, tools) {
  await page.fill('#search', words);
  await until(async () => tools.test(await text(page, '#tools')));
}
async function openRow(page, words) {
  await rowNamed(page, words).click();
  await visible(page.locator('#head', { hasText: words }));
}

async function owed() {
  const admin = await newPage();
  await check('the token is asked for, refused when wrong, kept in memory alone', async () => {
    await admin.goto(OWED);
    await visible(admin.locator('dialog', { hasText: 'API token' }));
    await admin.fill('dialog [name=token]', 'wrong');
    await admin.keyboard.press('Enter');
    await visible(admin.locator('dialog', { hasText: 'not accepted' }));
    await admin.fill('dialog [name=token]', TOKEN);
    await admin.keyboard.press('Enter');
    await visible(admin.locator('#live.on'));
    await visible(admin.locator('#row-0'));
    const kept = await admin.evaluate(() => [localStorage.length, sessionStorage.length, document.cookie].join());
    return kept === '0,0,' && await admin.locator('dialog').count() === 0;
  });
  await check('HTML mail is shown behind a token too', async () => {
    await admin.click('#row-0');
    await visible(admin.frameLocator('iframe').locator('p', { hasText: 'Sent.' }));
  });
  await check('queue: reason, attempts, next attempt, next hops', async () => {
    await admin.click('nav >> text=Queue');
    await visible(admin.locator('#pane tbody tr', { hasText: '450 4.2.1' }).first());
    await shoot(admin, 'queue');
    return /in \d+ (s|min|h)/.test(await text(admin, '#pane')) && (await text(admin, '#side')).includes('Next hops');
  });
  await check('delivery: each recipient with the next hop\'s words, and what was said', async () => {
    await admin.locator('#pane a').first().click();
    await admin.click('#tab-delivery');
    await visible(admin.locator('#body', { hasText: '4.2.1 The mailbox is busy' }));
    await admin.evaluate(() => document.getElementById('said').classList.remove('shown'));
    await shoot(admin, 'message');
    return (await text(admin, '#body')).includes('127.0.0.1');
  });
  await check('retry now, and the status follows by itself', async () => {
    await admin.click('#head >> text="Retry now"');
    await visible(admin.locator('#head .status.forwarded'));
  });
  await check('queue: retry one, remove one, retry all', async () => {
    const lines = () => admin.locator('#pane tbody tr').count();
    await admin.click('nav >> text=Queue');
    await until(async () => await lines() === 3);
    await admin.click('#pane tbody tr:first-child >> text="Retry"');
    await until(async () => await lines() === 2);
    await admin.click('#pane tbody tr:first-child >> text="Delete"');
    await admin.click('dialog >> button:has-text("Delete")');
    await until(async () => await lines() === 1);
    await admin.click('text="Retry all"');
    await visible(admin.locator('h1', { hasText: 'Nothing is owed' }));
  });
  await check('a message still owed is deleted only after a question', async () => {
    await send(OWED, 'Owed one', 'busy-last@example.com');
    await admin.click('nav >> text=Inbox');
    await visible(rowNamed(admin, 'Owed one').locator('.retrying'));
    await openRow(admin, 'Owed one');
    await admin.keyboard.press('#');
    await admin.click('dialog >> text="Cancel"');
    return await rowNamed(admin, 'Owed one').count() === 1;
  });
  await check('accounts: list, add (the key shown once), change, remove', async () => {
    await admin.click('nav >> text=Accounts');
    await visible(admin.locator('td', { hasText: /of.500/ }));
    await admin.click('text="Add account"');
    await admin.fill('dialog [name=name]', 'fresh');
    await admin.fill('dialog [name=password]', 'a long password');
    await admin.fill('dialog [name=domains]', 'a.example b.example');
    await admin.fill('dialog [name=daily]', '50');
    await admin.keyboard.press('Enter');
    await until(async () => (await admin.locator('dialog input').last().inputValue().catch(() => '')).startsWith('mp_live_'));
    await admin.click('dialog >> text="Done"');
    const row = admin.locator('tr', { hasText: 'a.example, b.example' });
    await row.locator('text=Change').click();
    await admin.fill('dialog [name=daily]', '60');
    await admin.keyboard.press('Enter');
    await visible(row.locator('td', { hasText: /of.60/ }));
    await shoot(admin, 'accounts');
    await row.locator('text=Remove').click();
    await admin.click('dialog >> button:has-text("Remove")');
    return until(async () => await row.count() === 0);
  });
}
const owner = owed();  // beside the others, as are those with a page of their own

const page = await newPage({}, outside), beside = [];
await visit(page);

await check('the list, and few rows in the document', async () => {
  await visible(page.locator('#row-0'));
  return /^\d{3} messages/.test(await text(page, '#tools')) && await page.locator('.row').count() < 50;
});
await check('open: HTML mail in a frame that may do nothing, its own images in it', async () => {
  await openRow(page, 'is on its way');
  const frame = page.frameLocator('iframe');
  await visible(frame.locator('h1', { hasText: 'on its way' }));
  const seen = await frame.locator('#logo').evaluate(node => node.naturalWidth);
  await shoot(page, 'inbox');
  return seen > 0 && await page.locator('iframe').getAttribute('sandbox') === 'allow-popups allow-popups-to-escape-sandbox'
    && await page.evaluate(() => document.activeElement.id) === 'subject'
    && await rowNamed(page, 'is on its way').getAttribute('aria-selected') === 'true';
});
const paper = on => on.evaluate(() => getComputedStyle(document.body).backgroundColor), inTheDark = [];
beside.push(check('dark, by the system', async () => {
  const dark = await newPage({ colorScheme: 'dark' });
  await visit(dark);
  await openRow(dark, 'Your visit on Thursday');
  inTheDark.push(await paper(dark));
  await visible(dark.frameLocator('iframe').locator('h1'));
  await dark.click('#theme');
  inTheDark.push(await paper(dark));
  await dark.context().close();
}));
beside.push(check('360 px: list, message, back, queue, no sideways scrolling', async () => {
  const phone = await newPage({ viewport: { width: 360, height: 720 }, deviceScaleFactor: 2, hasTouch: true, isMobile: true });
  const fits = () => phone.evaluate(() => document.documentElement.scrollWidth <= 360 && document.body.scrollHeight <= innerHeight);
  await visit(phone);
  await visible(phone.locator('#row-0'));
  await shoot(phone, 'phone');
  const list = await fits();
  await phone.evaluate(() => { document.getElementById('list').scrollTop = 560; });
  await visible(phone.locator('#row-20'));
  await phone.locator('#row-14').tap();
  await visible(phone.locator('#subject'));
  const hidden = !await phone.locator('#rail').isVisible(), message = await fits();
  await shoot(phone, 'phone-message');
  await phone.click('.back');
  await visible(phone.locator('#row-14'));
  const kept = await phone.evaluate(() => document.getElementById('list').scrollTop);
  await phone.goto(`${HELD}/#/queue`);
  await visible(phone.locator('h1', { hasText: /owed/ }));
  const queue = await fits();
  await phone.context().close();
  if (!(list && hidden && message && queue && kept === 560)) throw new Error([list, hidden, message, queue, kept].join());
}));
beside.push(check('without the relay the page says so, and comes back by itself', async () => {
  const cut = await newPage();
  await cut.goto(HELD + '/404');  /* of the same origin, so that the page itself can be given from here */
  const html = await (await fetch(HELD + '/')).text();
  await cut.route(HELD + '/', route => route.fulfill({ contentType: 'text/html', body: html }));
  await cut.route(HELD + '/api/**', route => route.abort());
  await cut.goto(HELD + '/');
  await visible(cut.locator('h1', { hasText: 'Cannot reach the relay' }));
  const never = await cut.locator('text="No mail yet"').count() === 0;
  await shoot(cut, 'lost');
  await cut.unroute(HELD + '/api/**');
  await visible(cut.locator('#live.on'));
  await visible(cut.locator('#row-0'));
  await visible(cut.locator('h1', { hasText: 'Nothing open' }));
  await cut.context().close();
  return never;
}));
beside.push(check('under a path prefix, behind a proxy', async () => {
  const proxy = http.createServer((asked, answer) => {
    const path = asked.url.replace(/^\/mail\//, '/');
    if (path === asked.url) return answer.writeHead(404).end();
    const on = http.request(HELD + path, { method: asked.method }, got => {
      answer.writeHead(got.statusCode, got.headers);
      got.pipe(answer);
    });
    asked.pipe(on);
    answer.on('close', () => on.destroy());
  }).listen(0, '127.0.0.1');
  await new Promise(done => proxy.on('listening', done));
  const origin = `http://127.0.0.1:${proxy.address().port}`, behind = await newPage();
  await behind.context().unrouteAll();
  await behind.goto(origin + '/mail/');
  await openRow(behind, 'is on its way');
  await visible(behind.frameLocator('iframe').locator('h1', { hasText: 'on its way' }));
  await visible(behind.locator('#live.on'));
  await behind.context().close();
  proxy.closeAllConnections();
  proxy.close();
}));
await check('remote content is off until asked for', async () => {
  if (outside.length) throw new Error(outside.join());
  await page.click('text="Load it"');
  await until(() => outside.includes('http://remote.test/pixel.png'));
  await visible(page.frameLocator('iframe').locator('h1'));
  outside.length = 0;
});
await check('a link in the mail opens a tab of its own, and the mail stays', async () => {
  const [tab] = await Promise.all([page.waitForEvent('popup'), page.frameLocator('iframe').locator('a.b').click()]);
  await until(() => outside.includes('https://shop.example/track/88213'));
  if (!tab.isClosed()) await tab.close();
  outside.length = tabs.length = 0;
  return page.frameLocator('iframe').locator('h1').isVisible();
});
await check('a link within the mail scrolls to its place', async () => {
  await openRow(page, 'Your visit on Thursday');
  const frame = page.frameLocator('iframe'), top = () => frame.locator('#terms').evaluate(node => node.getBoundingClientRect().top);
  await visible(frame.locator('#jump'));
  const before = await top();
  await frame.locator('#jump').click();
  await until(async () => await top() < before - 500);
  const stayed = tabs.length === 0 && await frame.locator('#jump').count() === 1;
  await openRow(page, 'is on its way');
  return stayed;
});
await check('the text has links that can be followed', async () => {
  await page.click('#tab-text');
  const link = page.locator('#body a').first();
  const seen = [await link.getAttribute('href'), await link.getAttribute('rel'), await link.getAttribute('target')].join();
  await page.click('#tab-html');
  if (!/^https:\/\/shop.example\/track\/\d+,noopener noreferrer,_blank$/.test(seen)) throw new Error(seen);
  const found = await page.evaluate(() => linked('See https://a.example/x_(y). (http://b.example/?a=1#c)! '
    + 'javascript:alert(1) <https://c.example>, ' + 'https://(('.repeat(50000)).filter(part => part.href).map(part => part.href));
  return found.slice(0, 3).join() === 'https://a.example/x_(y),http://b.example/?a=1#c,https://c.example/';
});
await check('phone and desktop widths', async () => {
  const width = () => page.locator('iframe').evaluate(node => node.clientWidth);
  await page.click('.view >> text="Phone"');
  await until(async () => await width() === 375);
  await page.click('.view >> text="Desktop"');
  return until(async () => await width() >= 720);
});
await check('the bottom is reached by scrolling', async () => {
  await page.evaluate(() => { document.getElementById('list').scrollTop = 1e9; });
  await visible(page.locator('#row-119'));
  await page.evaluate(() => { document.getElementById('list').scrollTop = 0; });
  await visible(page.locator('#row-0'));
});
await Promise.all(beside);  // from here on the list changes
await check('dark, by the button', async () => {
  const light = await paper(page);
  await page.click('#theme');
  const byButton = await paper(page);
  await page.click('#theme');
  return inTheDark.join('|') === [byButton, light].join('|') && byButton !== light;
});
await check('receive: new mail appears by itself, unread, and is said', async () => {
  await send(HELD, 'Brand new');
  await visible(page.locator('#row-0.unread', { hasText: 'Brand new' }));
  return (await page.textContent('#heard')).includes('Brand new') && /^\(\d/.test(await page.title());
});
await check('new mail does not move what is being read', async () => {
  await page.evaluate(() => { document.getElementById('list').scrollTop = 56 * 40; });
  await visible(page.locator('#row-45'));
  const at = () => page.evaluate(() => {
    const list = document.getElementById('list').getBoundingClientRect();
    return document.elementFromPoint(list.left + 50, list.top + 100).closest('.row').innerText;
  });
  const before = await at(), count = parseInt(await text(page, '#tools'));
  await send(HELD, 'Another');
  await until(async () => parseInt(await text(page, '#tools')) === count + 1);
  await sleep(50);
  const same = before === await at();
  await page.evaluate(() => { document.getElementById('list').scrollTop = 0; });
  await visible(page.locator('#row-0'));
  return same;
});
await check('search: found, not found, cleared by Escape; it has an address', async () => {
  await page.keyboard.press('/');
  await page.keyboard.type('subject:brand');
  await until(() => page.url().endsWith('#/search/subject%3Abrand'));
  await until(async () => (await text(page, '#tools')).startsWith('1 found'));
  await until(async () => await page.locator('.row').count() === 1);
  await page.reload();
  await until(async () => (await text(page, '#tools')).startsWith('1 found'));
  const words = await page.inputValue('#search');
  await seek(page, 'zzzz', /^0 found/);
  await seek(page, 'before:someday', /^0 found: before:someday cannot be read/);
  await page.focus('#search');
  await page.keyboard.press('Escape');
  await until(async () => /messages/.test(await text(page, '#tools')));
  await visible(page.locator('#live.on'));
  const active = await page.evaluate(() => document.activeElement.id);  // keys are the list's again
  const seen = [words, await page.inputValue('#search'), active === 'search'].join('|');
  if (seen !== 'subject:brand||false') throw new Error('saw ' + seen);
});
await check('a search that takes its time says so', async () => {
  let answer;
  const shown = new Promise(done => { answer = done; });
  await page.route(/query=slow/, async route => { await shown; await route.continue(); });
  await page.fill('#search', 'slow');
  await visible(page.locator('#tools', { hasText: 'Searching' }));
  answer();
  await until(async () => (await text(page, '#tools')).startsWith('0 found'));
  await page.unroute(/query=slow/);
  await seek(page, '', /messages/);
});
await check('a message opened by its address is chosen in the list; j goes on from there', async () => {
  const ids = (await (await fetch(`${HELD}/api/v1/messages?start=90&limit=2`)).json()).messages.map(row => row.ID);
  await page.goto('about:blank');
  await visit(page, '#/message/' + ids[0]);
  await visible(page.locator('#row-90[aria-selected=true]'));
  await visible(page.locator('#subject'));
  await page.keyboard.press('j');
  await visible(page.locator('#row-91[aria-selected=true]'));
  await until(() => page.url().endsWith(ids[1]));
  await page.keyboard.press('Escape');
  await page.evaluate(() => { document.getElementById('list').scrollTop = 0; });
  await visible(page.locator('#row-0'));
});
await check('/view/latest and /search?q= are the page at that place', async () => {
  await page.goto(HELD + '/view/latest');
  await visible(page.locator('#row-0[aria-selected=true]'));
  const [{ ID }] = (await (await fetch(`${HELD}/api/v1/messages?limit=1`)).json()).messages;
  const opened = page.url() === `${HELD}/#/message/${ID}`;
  await page.goto(HELD + '/#/search/100%');
  await until(async () => (await text(page, '#tools')).includes('found'));
  await page.goto(HELD + '/search?q=subject:brand');
  await until(async () => (await text(page, '#tools')).startsWith('1 found'));
  const words = await page.inputValue('#search');
  await visit(page);
  return opened && words === 'subject:brand';
});
await check('every tab shows its part; arrows go round', async () => {
  await openRow(page, 'is on its way');
  const want = { text: 'plain text', source: 'Subject:', headers: 'Message-Id', links: 'https://', delivery: 'Recipients' };
  for (const [key, words] of Object.entries(want)) {
    await page.click('#tab-' + key);
    await visible(page.locator('#body', { hasText: words }));
  }
  await page.focus('#tab-delivery');
  await page.keyboard.press('ArrowRight');
  await visible(page.locator('#tab-html[aria-selected=true]:focus'));
});
await check('a verification code is shown to be copied', async () => {
  await seek(page, 'subject:confirm', /found/);
  await rowNamed(page, 'Confirm').click();
  await visible(page.locator('#head .code'));
  return /^\d{6}$/.test(await text(page, '#head .code'));
});
await check('attachments are downloads', async () => {
  await seek(page, 'subject:invoice', /found/);
  await openRow(page, 'Invoice');
  await page.click('#tab-attachments');
  const [download] = await Promise.all([page.waitForEvent('download'), page.click('#body >> text="Download"')]);
  await seek(page, '', /messages/);
  return download.suggestedFilename() === 'invoice.pdf';
});
await check('release of a held message; its status follows by itself', async () => {
  await visit(page);
  await openRow(page, 'Another');
  await page.keyboard.press('r');
  const filled = await page.locator('dialog input').inputValue();
  await page.click('dialog >> button:has-text("Release")');
  await visible(page.locator('#head .status.forwarded'));
  await page.click('#tab-delivery');
  await visible(page.locator('#body', { hasText: '250' }));
  return filled === 'bob@example.com';
});
await check('resend to others makes a copy that goes out', async () => {
  await page.keyboard.press('r');
  await page.locator('dialog input').fill('one@example.com, two@example.com');
  await page.keyboard.press('Enter');
  const went = row => row.Bcc.map(who => who.Address).join() === 'one@example.com,two@example.com' && row.Status === 'forwarded';
  return until(async () => (await (await fetch(HELD + '/api/v1/messages?limit=3')).json()).messages.some(went));
});
await check('a refused release is said', async () => {
  await page.keyboard.press('r');
  await page.locator('dialog input').fill('<b>bad</b>');
  await page.keyboard.press('Enter');
  await visible(page.locator('#said.shown', { hasText: 'invalid address' }));
  return await page.locator('#said b').count() === 0;
});
await check('mark unread goes back to the list; delete opens the next message', async () => {
  await page.keyboard.press('u');
  await visible(page.locator('.row.unread', { hasText: 'Another' }).first());
  await until(() => page.url().endsWith('#/inbox'));
  await openRow(page, 'Brand new');
  await page.keyboard.press('#');
  await until(async () => await rowNamed(page, 'Brand new').count() === 0);
  return until(async () => !(await text(page, '#subject')).includes('Brand new'));
});
await check('keyboard: j, k, Enter, Esc, ?', async () => {
  await page.keyboard.press('Escape');
  await visible(page.locator('h1', { hasText: 'Nothing open' }));
  for (const key of ['j', 'j', 'j', 'k']) await page.keyboard.press(key);
  const id = await page.locator('.row.cursor').getAttribute('id');
  const active = await page.getAttribute('#list', 'aria-activedescendant');
  await page.keyboard.press('Enter');
  await visible(page.locator('#subject'));
  const first = page.url();
  await page.keyboard.press('j');
  await until(() => page.url() !== first);
  await visible(page.locator('#subject'));
  await page.keyboard.press('Escape');
  await visible(page.locator('h1', { hasText: 'Nothing open' }));
  await page.keyboard.press('?');
  await visible(page.locator('dialog', { hasText: 'release, resend or retry' }));
  await page.keyboard.press('Escape');
  return id === active && await page.evaluate(() => document.activeElement.id) === 'list';
});
await check('the strip is a plot with a label', async () => {
  const label = await page.getAttribute('#strip svg', 'aria-label');
  await page.locator('#strip g').nth(5).hover();
  return await page.locator('#strip g').count() === 24 && /[1-9]\d* received .*\d+ forwarded/.test(label)
    && /^\d\d:\d\d:/.test(await text(page, '#strip figcaption'));
});
await check('hostile: nothing runs, nothing leaves, nothing breaks out', async () => {
  outside.length = 0;
  await seek(page, 'from:mallory', /1 found/);
  await page.locator('.row').first().click();
  await page.click('#tab-html');
  const frame = page.frameLocator('iframe');
  await visible(frame.locator('p', { hasText: 'hostile body' }));
  for (const target of ['#go', '#js']) await frame.locator(target).click();
  for (const key of ['text', 'source', 'headers', 'attachments', 'links', 'delivery', 'html']) {
    await page.click('#tab-' + key);
    await visible(page.locator('#body.' + key));
  }
  await page.click('text="Load it"');  // even with remote content, nothing runs or navigates
  await visible(frame.locator('p', { hasText: 'hostile body' }));
  for (const target of ['#go', '#js']) await frame.locator(target).click();
  await sleep(50);
  const left = outside.filter(url => !/\.(png|css|woff)|\/[va]$/.test(url));
  const strange = await page.evaluate(() => [window.pwned,
    document.querySelectorAll('img, object, embed, form:not([role]), base').length, document.scripts.length,
    document.querySelectorAll('a[href^="javascript"], a[href^="data"]').length,
    document.documentElement.scrollWidth > innerWidth].join());
  if (left.length || dialogs.length || tabs.some(url => !/^(about:blank)?$/.test(url)) || strange !== ',0,1,0,false') throw new Error(JSON.stringify([left, dialogs, strange]));
  await frame.locator('#out').click();  /* a link that was clicked may open a tab, but not take this one */
  await visible(frame.locator('p', { hasText: 'hostile body' }));
  const stayed = page.url().startsWith(HELD) && tabs.every(url => /^(about:blank|http:\/\/evil.test\/click)?$/.test(url));
  outside.length = 0;
  return stayed;
});
await check('hostile: only http(s) links can be followed', async () => {
  await page.click('#tab-links');
  await visible(page.locator('#body a').first());
  const schemes = await page.locator('#body a').evaluateAll(all => all.map(a => a.protocol));
  return schemes.every(scheme => /^https?:$/.test(scheme));
});
await check('the page cannot be scripted from its own markup (CSP)', async () => {
  await page.evaluate(() => {
    const script = document.createElement('script');
    script.textContent = 'window.injected = 1';
    document.body.append(script);
  });
  return page.evaluate(() => window.injected === undefined);
});
await check('a screen reader has names, roles, and live regions', async () => {
  await visit(page);
  const bare = await page.evaluate(() =>
    [...document.querySelectorAll('button, input, a, [role=listbox], [role=option], svg')]
      .filter(node => !(node.getAttribute('aria-label') || node.textContent.trim())).length);
  return bare === 0 && await page.locator('[role=status]').count() >= 3 && await page.locator('header, nav, main').count() === 3;
});
await check('delete found, delete all, and the empty inbox', async () => {
  await seek(page, 'subject:visit', /^[1-9]\d* found/);
  await page.click('text="Delete found"');
  await page.click('dialog >> button:has-text("Delete")');
  await until(async () => (await text(page, '#tools')).startsWith('0 found'));
  await seek(page, '', /messages/);
  await page.click('text="Delete all"');
  await page.click('dialog >> button:has-text("Delete")');
  await visible(page.locator('h1', { hasText: 'No mail yet' }));
  const lines = await page.locator('.try code').allInnerTexts();
  await shoot(page, 'empty');
  return lines.length === 2 && /curl -T - smtp:\/\/127\.0\.0\.1:\d+\/me /.test(lines[0]) && /smtplib\.SMTP\('127\.0\.0\.1', \d+\)/.test(lines[1]);
});
await check('the first mail ends the emptiness', async () => {
  await send(HELD, 'The first');
  await visible(rowNamed(page, 'The first'));
  await visible(page.locator('h1', { hasText: 'Nothing open' }));
});
await owner;
await check('not one request left for another origin; no dialog; no error in the console', async () => {
  if (outside.length || strays.length || dialogs.length || errors.length) throw new Error(JSON.stringify([outside, strays, dialogs, errors.slice(0, 3)]));
});

if (SHOTS) {
  const terminal = await newPage({ viewport: { width: 1280, height: 640 } });
  await terminal.setContent(`<style>:root { color-scheme: light dark }
    body { margin: 0; padding: 40px; background: light-dark(#f1efeb, #0e0e10) }
    pre { height: 560px; margin: 0; padding: 24px 28px; box-sizing: border-box; overflow: hidden; border-radius: 10px;
      font: 16px/1.6 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; color: light-dark(#1c1b1a, #eae9e7);
      white-space: pre-wrap; background: light-dark(#fff, #17171a); border: 1px solid light-dark(#e6e4e0, #2f2f35) }
    b { font-weight: 400; color: light-dark(#2456c8, #93b4ff) }</style><pre></pre>`);
  await terminal.evaluate(text => {
    for (const line of text.split('\n')) {
      const node = document.createElement(/^(\$|  curl) /.test(line) ? 'b' : 'span');
      node.textContent = line + '\n';
      document.querySelector('pre').append(node);
    }
  }, TERMINAL);
  await shoot(terminal, 'terminal');
}
await browser.close();
console.log(failed ? `${failed} failed` : 'all is well');
process.exit(failed ? 1 : 0);
