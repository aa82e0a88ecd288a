import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    root: new URL('..', import.meta.url).pathname,
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/support/postgres.ts'],
    pool: 'forks',
    // A good part of the tests waits for leases and quotas.
    maxWorkers: 4,
    testTimeout: 120_000,
    // A shared runner can stand still for seconds; what fails twice more is broken.
    retry: process.env.CI === undefined ? 0 : 2,
    hookTimeout: 120_000,
  },
});
